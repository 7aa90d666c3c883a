"""Values that are kept up to a limit of bytes."""

import torch

from secateur.pruners.stores.recent import Recent, n_bytes


def test_tensors_used_last_are_kept_up_to_a_limit():
    recent, made = Recent(3 * 40), []

    def use(name, length=10):
        recent.get(name, lambda: made.append(name) or torch.zeros(length))

    for name in ("a", "b", "c", "a", "d", "a", "b"):
        use(name)
    assert made == ["a", "b", "c", "d", "b"]  # b went for d, c for b
    use("large", 1000)
    use("large", 1000)
    use("a")
    assert made[5:] == ["large", "a"]


def test_values_that_go_first_are_kept_while_there_is_room():
    recent, made = Recent(3 * 40), []

    def use(name, **kwargs):
        recent.get(name, lambda: made.append(name) or torch.zeros(10), **kwargs)

    use("a")
    use("spare", first_to_go=True)
    use("b")
    use("spare", first_to_go=True)
    assert made == ["a", "spare", "b"], "there is room"
    use("c")
    use("other", first_to_go=True)  # no room: it is not kept
    for name in ("a", "b", "c"):
        use(name)
    assert made == ["a", "spare", "b", "c", "other"], "the others stayed"
    use("spare", first_to_go=True)
    assert made[-1] == "spare"


def test_a_value_that_is_taken_leaves_room():
    recent = Recent[dict](3 * 40)
    for name in "abc":
        recent.put(name, {"step": 3, "weights": {"w": torch.zeros(10)}})
    assert recent.take("b")["step"] == 3
    assert recent.take("b") is None
    recent.put("d", {"w": torch.zeros(10)})
    assert [recent.take(name) is not None for name in "acd"] == [True, True, True]


def test_a_value_takes_the_place_of_another_under_its_key():
    recent = Recent[torch.Tensor](3 * 40)
    for value in range(5):
        recent.put("a", torch.full((10,), float(value)))
    recent.put("b", torch.zeros(10))
    assert recent.get("a", lambda: torch.zeros(1))[0] == 4.0


def test_one_that_is_made_may_use_another():
    recent = Recent[torch.Tensor](2 * 40)
    recent.get("sum", lambda: recent.get("term", lambda: torch.ones(10)) * 2)
    assert float(recent.get("sum", lambda: torch.zeros(1))[0]) == 2.0
    assert float(recent.get("term", lambda: torch.zeros(1))[0]) == 1.0


def test_all_tensors_in_nested_mappings_count():
    assert n_bytes({"step": 7, "a": torch.zeros(3), "b": {"c": torch.zeros(2, dtype=torch.bool)}}) == 14
    assert n_bytes(None) == 0


def test_without_values_there_is_room_for_all():
    recent = Recent[torch.Tensor](3 * 40)
    for name in "abc":
        recent.put(name, torch.zeros(10))
    recent.clear()
    assert recent.take("a") is None
    for name in "def":
        recent.put(name, torch.zeros(10))
    assert [recent.take(name) is not None for name in "def"] == [True, True, True]
