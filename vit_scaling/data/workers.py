"""Child processes that end with their parent."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends the calling child process when its parent ends, even by `kill -9`, so that it never waits forever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()
