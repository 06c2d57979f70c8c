import pytest

from moejax.collectives.codecs import BlockQuant, TwoBit
from moejax.core.errors import InputError
from moejax.sync.plan import (
    Outer,
    SyncPlan,
    cd_sgd,
    diloco,
    local_sgd,
    partial_local_sgd,
    streaming_diloco,
)


def test_plans_say_what_is_due():
    assert [local_sgd(3).due(step) for step in range(3)] == [(), (), (0,)]
    streaming = streaming_diloco(6, 3)
    assert [streaming.due(step) for step in range(6)] == [(0,), (), (1,), (), (2,), ()]
    dream = partial_local_sgd([[0], [1, 0]], 2)
    assert [dream.due(step) for step in range(2)] == [(0, 1), (1,)]
    delayed = cd_sgd(0.1, 4)
    assert delayed.due(0) == (0,) and delayed.codec == TwoBit(0.1) and delayed.overlap
    assert diloco(5).outer == Outer(learning_rate=0.7, momentum=0.9)
    assert len({local_sgd(3), local_sgd(3), diloco(3)}) == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: local_sgd(0), "fragment 0 is synchronised in steps|period=0 must be"),
        (lambda: SyncPlan(when=(), period=1), "at least one fragment"),
        (lambda: SyncPlan(when=((),), period=1), r"in steps \(\)"),
        (lambda: SyncPlan(when=((0, 0),), period=1), r"in steps \(0, 0\), which must be different"),
        (lambda: SyncPlan(when=((2,),), period=2), r"different ones of 0..1"),
        (lambda: SyncPlan(when=((0,),), period=1, keep_local=1.0), "keep_local=1.0"),
        (lambda: SyncPlan(when=((0,),), period=1, codec=BlockQuant()), "wants an outer optimizer"),
        (lambda: SyncPlan(when=((0,),), period=1, exact_every=2), "exact_every=2 wants a codec"),
        (lambda: streaming_diloco(2, 3), "num_fragments=3 must be between 1 and period=2"),
        (lambda: Outer(learning_rate=0.0), "learning_rate=0.0 must be positive"),
        (lambda: Outer(momentum=1.0), "momentum=1.0"),
    ],
)
def test_plans_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
