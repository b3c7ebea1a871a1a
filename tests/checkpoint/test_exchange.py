import pytest
from torch.distributed import TCPStore

from paceline.checkpoint import StoreExchange


def test_texts_go_through_a_store_and_what_is_missing_is_named():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = StoreExchange(store, "saves"), StoreExchange(store, "saves")
    first.post("3/0", "a")
    second.post("3/1", "b")
    assert first.collect("3", 2, timeout_s=5.0) == second.collect("3", 2, timeout_s=5.0) == ["a", "b"]
    with pytest.raises(TimeoutError, match=r"nothing came within 0.05 s for 3/2$"):
        first.collect("3", 3, timeout_s=0.05)
    second.discard("3/1")
    with pytest.raises(TimeoutError, match="3/1"):
        first.collect("3", 2, timeout_s=0.05)
