"""Dictionaries to typed dataclasses and back: every error is told, the identity is stable."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import pytest

from cutmix_exp.errors import UserError
from cutmix_exp.schema import Part, build, identity_of, option, to_dict, unknown_field


@dataclass(frozen=True, kw_only=True)
class Wheel(Part):
    spokes: int = option(8, ge=1, le=64)


@dataclass(frozen=True, kw_only=True)
class SolidWheel(Wheel):
    hidden: float = option(1.0, identity=False)


@dataclass(frozen=True, kw_only=True)
class Engine(Part):
    power: float = option(gt=0)


@dataclass(frozen=True, kw_only=True)
class Seat:
    count: int = 2


@dataclass(frozen=True, kw_only=True)
class Car:
    wheels: ClassVar[int] = 4

    name: str
    old: bool = False
    doors: int = option(4, ge=2, lt=6)
    length: float = option(4.2, gt=0, le=20)
    width: float = 1.8
    colour: Literal["red", "blue"] = "red"
    gear: Literal[5, 6] = 5
    nickname: str | None = None
    tow: float | None = option(None, ge=0)
    shares: tuple[float, ...] = option((0.5, 0.75), ge=0, le=1)
    tags: tuple[str, ...] = ()
    prices: dict[str, int] = option(factory=dict, ge=0)
    seat: Seat = field(default_factory=Seat)
    wheel: Wheel = option(factory=Wheel)
    spares: dict[str, Wheel] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Has both hooks: before the conversion and after."""

    low: int = 0
    high: int = 1

    @staticmethod
    def check_raw(data: dict[str, Any]) -> None:
        if "lowest" in data:
            raise UserError("the raw data is refused")

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise UserError("low exceeds high")


WHEEL, SOLID = f"{__name__}.Wheel", f"{__name__}.SolidWheel"
FULL: dict[str, Any] = {
    "name": "mini",
    "old": True,
    "doors": 2,
    "length": 3.5,
    "width": 1.5,
    "colour": "blue",
    "gear": 6,
    "nickname": "m",
    "tow": 0.5,
    "shares": [0.0, 1.0],
    "tags": ["a", "b"],
    "prices": {"uk": 1, "de": 2},
    "seat": {"count": 3},
    "wheel": {"_target_": SOLID, "spokes": 3, "hidden": 2.5},
    "spares": {"b": {"_target_": WHEEL, "spokes": 5}, "a": {"_target_": WHEEL, "spokes": 6}},
}


def refused(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(Car, {"name": "mini", **fields}, "car")
    return str(caught.value)


# ------------------------------------------------------------------------------- round trips


def test_every_field_survives_the_round_trip() -> None:
    car = build(Car, FULL)
    assert to_dict(car) == FULL
    assert build(Car, to_dict(car)) == car
    assert car.shares == (0.0, 1.0)
    assert car.wheel == SolidWheel(spokes=3, hidden=2.5)
    assert list(car.spares) == ["b", "a"]


def test_defaults_fill_what_is_not_given() -> None:
    car = build(Car, {"name": "mini"})
    assert car == Car(name="mini")
    assert build(Car, to_dict(car)) == car


def test_build_leaves_its_input_alone() -> None:
    data = to_dict(build(Car, FULL))
    build(Car, data)
    assert data == FULL


def test_to_dict_is_plain_json() -> None:
    """A tuple or a dataclass that were left in it would not come back equal."""
    plain = to_dict(build(Car, FULL))
    assert json.loads(json.dumps(plain)) == plain


def test_fields_are_frozen() -> None:
    with pytest.raises(AttributeError):
        build(Car, FULL).doors = 3  # type: ignore[misc]


# ------------------------------------------------------------------------------------- names


def test_an_unknown_field_is_told_with_the_nearest_one() -> None:
    message = refused(dors=3)
    assert "there is no field 'car.dors'; did you mean 'car.doors'?" in message
    assert "fields of 'car': colour, doors, gear, length, name" in message


def test_an_unknown_field_far_from_all_has_no_hint() -> None:
    message = refused(xyzzy=3)
    assert "there is no field 'car.xyzzy'\n" in message
    assert "did you mean" not in message


def test_an_unknown_field_of_an_inner_group_has_its_whole_path() -> None:
    message = refused(seat={"cont": 1})
    assert "'car.seat.cont'; did you mean 'car.seat.count'?" in message
    assert "fields of 'car.seat': count" in message
    message = refused(spares={"left": {"_target_": WHEEL, "spoke": 1}})
    assert "'car.spares.left.spoke'; did you mean 'car.spares.left.spokes'?" in message


def test_an_unknown_field_at_the_top_level() -> None:
    with pytest.raises(UserError, match=r"'nam'; did you mean 'name'\?\nfields of the top level"):
        build(Car, {"nam": "mini"})
    assert unknown_field("a.b", []).endswith("fields of 'a': (none)")


@pytest.mark.parametrize("name", ["wheels", "check_raw", "__class__"])
def test_what_is_no_field_cannot_be_set(name: str) -> None:
    assert f"there is no field 'car.{name}'" in refused(**{name: 5})


def test_a_missing_field_is_told() -> None:
    with pytest.raises(UserError, match="the configuration: the field 'name' is missing"):
        build(Car, {})
    engine = {"_target_": f"{__name__}.Engine"}
    with pytest.raises(UserError, match=r"^engine: the field 'power' is missing"):
        build(Engine, engine, "engine")


@pytest.mark.parametrize("given", [None, 3, "text", [1], True])
def test_a_group_that_is_no_mapping_is_refused(given: Any) -> None:
    assert refused(seat=given).startswith("car.seat: expected a group of fields, got")
    with pytest.raises(UserError, match="the configuration: expected a group"):
        build(Car, given)


# ------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("old", 1, "true or false"),
        ("old", 0, "true or false"),
        ("old", "true", "true or false"),
        ("old", None, "true or false"),
        ("doors", True, "a whole number"),
        ("doors", 4.0, "a whole number"),
        ("doors", "4", "a whole number"),
        ("doors", None, "a whole number"),
        ("doors", [4], "a whole number"),
        ("length", "4.2", "a number"),
        ("length", "1e-4", "a number"),
        ("length", False, "a number"),
        ("length", None, "a number"),
        ("name", 7, "a text"),
        ("name", None, "a text"),
        ("name", True, "a text"),
        ("nickname", 7, "a text"),
        ("tow", "0.5", "a number"),
        ("tow", True, "a number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: Any, expected: str) -> None:
    kind = type(value).__name__
    assert refused(**{name: value}) == f"car.{name}={value!r} is a {kind}; expected {expected}"


def test_a_whole_number_is_a_number() -> None:
    car = build(Car, {"name": "mini", "length": 4, "shares": [0, 1], "tow": 2})
    for value in (car.length, *car.shares, car.tow):
        assert type(value) is float
    assert (car.length, car.shares, car.tow) == (4.0, (0.0, 1.0), 2.0)


def test_none_is_allowed_where_the_field_is_optional() -> None:
    car = build(Car, {"name": "mini", "nickname": None, "tow": None})
    assert (car.nickname, car.tow) == (None, None)


@pytest.mark.parametrize(
    "name", ["old", "doors", "width", "colour", "shares", "prices", "seat", "wheel", "spares"]
)
def test_none_is_refused_elsewhere(name: str) -> None:
    assert refused(**{name: None}).startswith(f"car.{name}")


@pytest.mark.parametrize("value", ["green", "", "Red", True, 5, None])
def test_a_choice_is_one_of_the_allowed(value: Any) -> None:
    wanted = f"car.colour={value!r} is not allowed; choose one of red, blue"
    assert refused(colour=value) == wanted


@pytest.mark.parametrize("value", [4, "5", True])
def test_a_choice_among_numbers(value: Any) -> None:
    assert build(Car, {"name": "mini", "gear": 6}).gear == 6
    assert "choose one of 5, 6" in refused(gear=value)


@pytest.mark.parametrize("value", [0.5, "0.5", {"a": 0.5}, True])
def test_a_list_is_expected(value: Any) -> None:
    message = refused(shares=value)
    assert message == f"car.shares={value!r}: expected a list such as [0.5,0.75]"


def test_each_element_of_a_list_is_checked() -> None:
    assert refused(shares=[0.5, "x"]).startswith("car.shares[1]='x' is a str")
    assert refused(shares=[0.5, 1.5]) == (
        "car.shares[1]=1.5 is out of range; allowed: >= 0 and <= 1"
    )
    assert refused(tags=["a", 2]).startswith("car.tags[1]=2 is a int")
    assert build(Car, {"name": "mini", "shares": []}).shares == ()
    assert build(Car, {"name": "mini", "shares": (0.25,)}).shares == (0.25,)


@pytest.mark.parametrize("value", [3, "x", [1], True])
def test_a_mapping_is_expected(value: Any) -> None:
    assert refused(prices=value) == f"car.prices={value!r}: expected a mapping"


def test_each_value_of_a_mapping_is_checked() -> None:
    assert refused(prices={"uk": 1.5}).startswith("car.prices.uk=1.5 is a float")
    assert refused(prices={"uk": -1}) == "car.prices.uk=-1 is out of range; allowed: >= 0"
    assert build(Car, {"name": "mini", "prices": {1: 2}}).prices == {"1": 2}


# ------------------------------------------------------------------------------------ ranges


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("doors", 1, ">= 2 and < 6"),
        ("doors", 6, ">= 2 and < 6"),
        ("doors", -(10**30), ">= 2 and < 6"),
        ("length", 0.0, "> 0 and <= 20"),
        ("length", 0, "> 0 and <= 20"),
        ("length", 20.5, "> 0 and <= 20"),
        ("tow", -0.1, ">= 0"),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: Any, allowed: str) -> None:
    message = refused(**{name: value})
    assert re.fullmatch(rf"car\.{name}=\S+ is out of range; allowed: {re.escape(allowed)}", message)


@pytest.mark.parametrize(
    ("name", "value"), [("doors", 2), ("doors", 5), ("length", 1e-300), ("length", 20), ("tow", 0)]
)
def test_the_bounds_are_allowed_where_they_belong(name: str, value: Any) -> None:
    assert getattr(build(Car, {"name": "mini", name: value}), name) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["length", "width", "tow"])
def test_only_finite_numbers_are_allowed(name: str, value: float) -> None:
    assert f"car.{name}={value} is out of range" in refused(**{name: value})
    assert "a finite number" in refused(width=value)


def test_not_a_number_in_a_list_is_refused() -> None:
    assert refused(shares=[float("nan")]).startswith("car.shares[0]=nan is out of range")


# ------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (f"{__name__}.Engine", f"'{__name__}.Engine' is not a Wheel"),
        (f"{__name__}.Seat", "is not a Wheel"),
        (f"{__name__}.WHEEL", "is not a Wheel"),
        (f"{__name__}.Nothing", f"cannot import '{__name__}.Nothing'"),
        ("no_such_package.Wheel", "cannot import 'no_such_package.Wheel'"),
        ("tests.no_such_module.Wheel", "cannot import"),
        ("os.path", "is not a Wheel"),
        (".Wheel", "'.Wheel'"),
        ("..tests.Wheel", "'..tests.Wheel'"),
        ("tests..Wheel", "'tests..Wheel'"),
        ("Wheel", "expected '_target_: package.module.Class', got 'Wheel'"),
        ("", "expected '_target_"),
        (None, "expected '_target_"),
        (7, "expected '_target_"),
    ],
)
def test_a_target_that_is_no_such_part_is_refused(target: Any, said: str) -> None:
    message = refused(wheel={"_target_": target})
    assert message.startswith("car.wheel: ")
    assert said in message


def test_a_part_without_target_is_refused() -> None:
    assert "expected '_target_: package.module.Class'" in refused(wheel={"spokes": 3})


def test_a_target_where_there_is_no_choice_is_refused() -> None:
    message = refused(seat={"_target_": f"{__name__}.Seat"})
    assert message.startswith("car.seat: '_target_' is not allowed here")


def test_a_part_is_built_as_the_class_that_is_named() -> None:
    assert type(build(Wheel, {"_target_": SOLID})) is SolidWheel
    assert type(build(Wheel, {"_target_": WHEEL})) is Wheel
    assert "is out of range" in refused(wheel={"_target_": SOLID, "spokes": 65})


def test_errors_of_the_hooks_are_told() -> None:
    with pytest.raises(UserError, match=r"^group: low exceeds high$"):
        build(Checked, {"low": 3}, "group")
    with pytest.raises(UserError, match="the raw data is refused"):
        build(Checked, {"lowest": 3}, "group")


# ---------------------------------------------------------------------------------- identity


@dataclass(frozen=True, kw_only=True)
class Run:
    seed: int = 0
    folder: str = option("runs", identity=False)
    added: int = option(0, neutral=0)
    limit: float | None = option(None, neutral=None)
    wheel: Wheel = option(factory=Wheel)
    wheels: dict[str, Wheel] = field(default_factory=dict)
    shares: tuple[float, ...] = (0.5,)
    seat: Seat = option(factory=Seat, identity=False)


def test_the_identity_has_what_counts() -> None:
    run = Run(wheels={"b": Wheel(spokes=1), "a": SolidWheel(spokes=2)})
    assert identity_of(run) == {
        "seed": 0,
        "wheel": {"class": "Wheel", "spokes": 8},
        "wheels": [
            ["b", {"class": "Wheel", "spokes": 1}],
            ["a", {"class": "SolidWheel", "spokes": 2}],
        ],
        "shares": [0.5],
    }


@pytest.mark.parametrize(
    "change",
    [{"folder": "elsewhere"}, {"seat": Seat(count=5)}, {"wheels": {"a": SolidWheel(hidden=9.0)}}],
    ids=str,
)
def test_fields_outside_the_identity_do_not_change_it(change: dict[str, Any]) -> None:
    base = Run(wheels={"a": SolidWheel()})
    assert identity_of(replace(base, **change)) == identity_of(base)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"added": 1},
        {"limit": 0.0},
        {"wheel": Wheel(spokes=9)},
        {"wheel": SolidWheel()},
        {"shares": (0.5, 0.5)},
        {"wheels": {"a": Wheel()}},
    ],
    ids=str,
)
def test_every_other_field_changes_the_identity(change: dict[str, Any]) -> None:
    assert identity_of(Run(**change)) != identity_of(Run())


def test_a_neutral_field_is_left_out_at_its_neutral_value_alone() -> None:
    assert {"added", "limit"}.isdisjoint(identity_of(Run()))
    assert identity_of(Run(added=2, limit=0.5)) == identity_of(Run()) | {"added": 2, "limit": 0.5}


def test_the_order_of_a_mapping_counts() -> None:
    one = Run(wheels={"a": Wheel(), "b": SolidWheel()})
    other = Run(wheels={"b": SolidWheel(), "a": Wheel()})
    assert one == other
    assert identity_of(one) != identity_of(other)


def test_a_moved_class_keeps_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    def wheel_in(name: str) -> Any:
        module: Any = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        kind: Any = dataclass(frozen=True, kw_only=True)(
            type(
                "Wheel",
                (Part,),
                {"__module__": name, "__annotations__": {"spokes": int}, "spokes": 8},
            )
        )
        module.Wheel = kind
        return kind

    old, new = wheel_in("old_place"), wheel_in("new_place")
    assert to_dict(old())["_target_"] == "old_place.Wheel"
    assert to_dict(new())["_target_"] == "new_place.Wheel"
    assert identity_of(old()) == identity_of(new()) == identity_of(Wheel())
    assert type(build(Part, to_dict(new()))) is new
