import pytest

from mmtp.registry import REGISTRY, Registry, UnknownNameError


def test_classes_are_imported_only_when_asked_for():
    registry = Registry({"thing": {"present": "decimal:Decimal", "absent": "no_such_module:Nothing"}})
    assert registry.names("thing") == ["absent", "present"]
    from decimal import Decimal

    assert registry.resolve("thing", "present") is Decimal
    with pytest.raises(ModuleNotFoundError):
        registry.resolve("thing", "absent")


def test_unknown_names_get_a_hint():
    registry = Registry({"thing": {"alpha": "a:A", "beta": "b:B"}})
    with pytest.raises(UnknownNameError, match="no thing is called 'alpah'; did you mean 'alpha'?"):
        registry.resolve("thing", "alpah")
    with pytest.raises(UnknownNameError, match="known: alpha, beta"):
        registry.resolve("thing", "zzz")
    with pytest.raises(UnknownNameError, match="known: none"):
        registry.resolve("other", "zzz")


def test_a_class_of_ones_own_is_found_both_ways():
    registry = Registry({})
    registry.register("thing", "mine", f"{Registry.__module__}:Registry")
    assert registry.resolve("thing", "mine") is Registry
    assert registry.name_of(Registry) == ("thing", "mine")
    with pytest.raises(UnknownNameError, match=r"call REGISTRY.register\(family, name, 'builtins:int'\)"):
        registry.name_of(int)


def test_every_registered_class_exists_and_knows_its_name():
    for family, entries in REGISTRY._families.items():
        for name in entries:
            assert REGISTRY.name_of(REGISTRY.resolve(family, name)) == (family, name)
