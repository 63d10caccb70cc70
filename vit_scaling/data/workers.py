"""What a process that others work for expects of them."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Called in a child process: it ends when its parent does, were it by `kill -9`, and waits for nobody in vain."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()
