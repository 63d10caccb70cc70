"""The benchmark of GPU kernels, interpreted: its two sides compute the same."""

import pytest

from benchmarks import gpu_kernels


@pytest.mark.parametrize("kind", gpu_kernels.CASES)
def test_a_kernel_rounds_no_more_than_what_it_replaces(kind):
    ((ours, theirs),) = gpu_kernels.main(["--interpret", "--only", kind])
    assert 0 < ours < 1.2 * theirs < 1e-2


def test_without_a_gpu_one_sentence_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu_kernels.main([])
    assert "there is no NVIDIA GPU here" in capsys.readouterr().err
