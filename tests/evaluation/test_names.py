import math

import pytest

from puat_fast.evaluation.names import AttackSpec, parse_attack, parse_attacks


def test_clean_and_pgd_as_in_table_ix() -> None:
    assert parse_attack("clean") == AttackSpec(name="clean", kind="clean")
    assert parse_attack("pgd-8") == AttackSpec(name="pgd-8", kind="pgd", eps=8 / 255, step_size=1 / 255, num_steps=20)
    ten = parse_attack("aa-10it")
    assert ten == AttackSpec(name="aa-10it", kind="aa", eps=8 / 255, step_size=None, num_steps=10)
    assert parse_attack("aa") == AttackSpec(name="aa", kind="aa", eps=8 / 255, step_size=None, num_steps=100)
    assert math.isclose(parse_attack("pgd-0.5").eps, 0.5 / 255)
    assert parse_attack("pgd-8.0") == parse_attack("pgd-8")


@pytest.mark.parametrize(
    "name", ["", "pgd", "pgd-", "pgd-0", "pgd-256", "pgd--1", "pgd-8/255", "pgd-nan", "aa-8", "aa-0it", "AA", "Clean"]
)
def test_other_names_are_refused_with_what_is_accepted(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not one of clean, pgd-E"):
        parse_attack(name)


@pytest.mark.parametrize("name", ["pgd-2.3456789", "pgd-0.00000001", "gpgd-0.12345678", "gpgd-1e-7"])
def test_a_name_stands_for_its_own_radius(name: str) -> None:
    spec = parse_attack(name)
    assert parse_attack(spec.name) == spec
    assert spec.eps == float(name.split("-", 1)[1]) / (255 if name.startswith("pgd") else 1)


def test_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean pgd-8"):
        parse_attack("pdg-8")


def test_list_keeps_the_order_and_drops_repeats() -> None:
    assert [spec.name for spec in parse_attacks("pgd-8, clean,pgd-8.0")] == ["pgd-8", "clean"]
    with pytest.raises(ValueError):
        parse_attacks("clean,")
