import threading

from paceline.workers.process import torch_start_method


def test_a_process_with_threads_is_not_forked_to_compute():
    """A forked child would wait for OpenMP threads that only its parent has."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert torch_start_method() == "spawn"
    finally:
        done.set()
        thread.join()
