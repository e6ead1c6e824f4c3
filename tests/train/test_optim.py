import pytest
from torch import nn

from modernbert.train.optim import adamw, warmup_and_decay


def test_schedule_rises_stays_and_falls():
    rates = [warmup_and_decay(step, steps=100, warmup=0.1, decay=0.4) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:61] == pytest.approx([1.0] * 52)
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 40)


def test_the_table_has_a_learning_rate_of_its_own():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1))
    table, others = adamw(model, model[0].weight, learning_rate=0.1, table_rate=0.2).param_groups
    assert (table["lr"], others["lr"]) == (0.2, 0.1)
    assert table["params"] == [model[0].weight]
    assert [id(x) for x in others["params"]] == [id(x) for x in model[1].parameters()]
