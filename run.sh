#!/usr/bin/env bash
# Everything starts here; `./run.sh help` says what there is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'TEXT'
./run.sh              make the environment, pretrain a small ViT on real digits, show the result (minutes)

./run.sh train ARGS     pretrain or fine-tune: --config=configs/vit_imagenet.py:S/16 --workdir=runs/s16
./run.sh evaluate ARGS  measure weights: accuracy, calibration, few-shot accuracy, speed
./run.sh predict ARGS   classify images
./run.sh explore ARGS   look inside a model, compare runs
./run.sh weights ARGS   show, import and export weight files
./run.sh prepare ARGS   convert images to shards
./run.sh plan ARGS      compile a config for a machine that is not here: memory, time, cost
./run.sh study ARGS     run a scaling study or a sweep
./run.sh costs ARGS     parameters, FLOPs and memory of each model

./run.sh pod ARGS       train on a slice of Cloud TPU VMs
./run.sh slurm ARGS     train on a Slurm cluster
./run.sh k8s ARGS       train on Kubernetes

./run.sh install [X]    make the environment, with an extra: tpu or cuda
./run.sh test [ARGS]    run the tests; arguments go to pytest
./run.sh lint           check format, style and types
./run.sh docs           make the documentation as a site, in site/
./run.sh mutants [NAME] put known mistakes into a copy of the code and check that tests notice them
./run.sh faults ARGS    disturb a small run in many ways and check that nothing is lost
./run.sh python         print the Python that is used
./run.sh help           this text

Each command explains its flags with --help; pod, slurm and k8s show with --dry-run what they would do. Paths are
relative to this folder. The environment is made once, in .venv, and again when requirements.txt or pyproject.toml change.
TEXT
}

# On a CPU, XLA allocates new memory for every step, and a tenth of the step goes to page faults of 4 KiB each. This makes
# glibc ask for huge pages (docs/performance.md).
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The newest Python from 3.11 on that really runs: a version manager's shim can exist and fail.
find_python() {
  local name
  for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  fail "no Python from 3.11 to 3.14 that runs (with venv and pip) was found on PATH; install one, then call this again"
}

# browser: some tests open pages in Chromium. Installs Debian's where this user may; the tests say if there is none.
browser() {
  local name
  for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null 2>&1; then
      return
    fi
  done
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    say "installing chromium, in which tests open pages: apt-get install chromium"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes chromium; } >/dev/null 2>&1 ||
      say "chromium could not be installed; the tests that need it are left out"
  fi
}

# environment EXTRA: makes .venv and installs the project with this extra, unless that was done already.
environment() {
  local extras=$1 stamp wanted
  if [ -x .venv/bin/python ] && ! .venv/bin/python -c '' 2>/dev/null; then
    say "the Python of .venv no longer runs: making .venv again"
    rm -rf .venv
  fi
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(find_python)
    say "making .venv with $python ($("$python" --version))"
    "$python" -m venv .venv
  fi
  stamp=.venv/installed-${extras:-run}
  wanted=$(cat requirements.txt pyproject.toml | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "installing requirements.txt${extras:+ and the extra \"$extras\"} (about a minute, 1 GB)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
    printf '%s\n' "$wanted" >"$stamp"
  fi
}

command=${1:-smoke}
[ $# -eq 0 ] || shift
case $command in
smoke)
  environment ""
  say "pretraining a small ViT on 4,000 handwritten digits: ./run.sh train --config=configs/smoke.py --workdir=runs/smoke"
  exec .venv/bin/python -m vit_scaling.train --config=configs/smoke.py --workdir=runs/smoke
  ;;
train | evaluate | predict | explore | weights | prepare | plan | study | costs)
  environment ""
  exec .venv/bin/python -m "vit_scaling.$command" "$@"
  ;;
pod | slurm | k8s) exec "launch/$command.sh" "$@" ;;
install) environment "${1:-}" ;;
test)
  environment test
  browser
  say "running the tests: python -m pytest --numprocesses=2 --dist=loadfile $*"
  exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile "$@"
  ;;
mutants | faults)
  environment test
  exec .venv/bin/python -m "tests.$command" "$@"
  ;;
lint)
  environment test
  say "checking format, style and types"
  .venv/bin/ruff format --check .
  .venv/bin/ruff check .
  .venv/bin/mypy
  ;;
docs)
  environment docs
  NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict
  say "open site/index.html"
  ;;
python) find_python ;;
help | --help | -h) usage ;;
*)
  fail "there is no command '$command'; ./run.sh help lists them"
  ;;
esac
