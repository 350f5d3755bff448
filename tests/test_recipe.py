"""Recipes: numbers, defaults, unknown fields, one-line faults."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunedm import recipe as recipes
from prunedm.recipe import Recipe, RecipeError


def test_the_documented_recipe_is_accepted_and_has_the_documented_names():
    document = recipes.parse(
        """
        name: demo
        seed: 0
        device: auto
        model: {source: bundled}
        data:  {source: bundled, batch_size: 64}
        prune: {method: magnitude, target: 0.4, finetune_steps: 200}
        mask:  {n: 2, m: 4, method: gumbel, steps: 300, train_weights: false, recover_steps: 200}
        train: {lr: 2e-4, ema: 0.999}
        eval:  {images: 512, sampler: ddim, steps: 25, extractor: bundled, seed: 0}
        """
    )
    assert recipes.build(document) == Recipe()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3"])
def test_scientific_notation_without_a_dot_is_a_number(text):
    assert recipes.build(recipes.assignment(f"train.lr={text}")).train.lr == 1e-4


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("mask.n=4", ["mask", "n=4", "must be less than m=4"]),
        ("mask.n=5", ["mask", "n=5"]),
        ("prune.target=1.5", ["prune.target=1.5", "less than or equal to 0.9"]),
        ("prune.target=-0.1", ["prune.target=-0.1"]),
        ("prune.taget=0.4", ["prune.taget", "not a field", "target"]),
        ("colour=red", ["colour", "not a field", "prune"]),
        ("mask.method=magic", ["mask.method='magic'", "gumbel"]),
        ("data.batch_size=0", ["data.batch_size=0"]),
        ("train.lr=.nan", ["train.lr"]),
        ("device=gpu", ["device='gpu'", "cuda"]),
        ("name=../up", ["name='../up'"]),
        ("seed=-1", ["seed=-1"]),
        ("mask.layers=[{match: a, pattern: 4:2}]", ["mask.layers.0.pattern='4:2'", "1 <= N < M <= 16", "try 2:4"]),
        ("mask.layers=[{match: a, pattern: 1:4, foo: 1}]", ["mask.layers.0.foo", "not a field", "match, pattern"]),
        ("mask.flip_budget=0.9", ["flip_budget=0.9", "must be below 0.833 for 2:4"]),
        ("mask={method: wanda, lr: 0.1}", ["lr=0.1 is not read by method=wanda", "gumbel"]),
        ("mask={method: offset, initial: fisher}", ["initial=fisher is not read by method=offset"]),
        ("mask={method: gumbel, samples: 2}", ["samples=2 is not read by method=gumbel", "reinforce"]),
        ("mask={method: none, density: 0.5}", ["density=0.5 is not read by method=none", "other than none"]),
        ("mask.method=sr-ste", ["sr-ste follows the weights", "train_weights"]),
        ("mask={masks_from: 0.5, masks_until: 0.5}", ["masks_from=0.5 must be less than masks_until=0.5"]),
        ("mask.then=sr-ste", ["then=sr-ste follows the weights after masks_until"]),
        ("mask.weights_from=0.5", ["read when the weights train"]),
        ("mask={method: reinforce, antithetic: true}", ["samples=1 is odd"]),
        ("mask={method: reinforce, cached_batches: 2, train_weights: true}", ["cached_batches", "frozen"]),
        ("mask={tau_start: 0.1, tau_end: 1}", ["tau_end=1.0 must not exceed tau_start=0.1"]),
        ("eval={sampler: ddpm, eta: 0.5}", ["eta=0.5 is not read by sampler=ddpm", "use ddim"]),
        ("eval.eta=1.5", ["eval.eta=1.5", "less than or equal to 1"]),
        ("eval.sampler=heun", ["eval.sampler='heun'", "dpm-solver++"]),
        ("mask={density: 0.5, initial: some-run}", ["density chooses patterns", "initial=some-run"]),
    ],
)
def test_bad_values_are_one_line_with_value_and_rule(assignment, parts):
    with pytest.raises(RecipeError) as caught:
        recipes.resolve(assignments=[assignment])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_shipped_figures_are_not_those_of_another_eta():
    from prunedm import bundled

    plain, noisy = (recipes.resolve(assignments=[f"eval.eta={eta}"]).eval for eta in (0, 0.5))
    assert bundled.settings_key(plain) == "512-ddim-25-bundled-0"
    assert bundled.settings_key(noisy) != bundled.settings_key(plain) and bundled.sheet(noisy) != bundled.sheet(plain)


def test_patterns_need_no_quotes_in_yaml():
    """YAML 1.1 reads 1:4 as the number 64 in base 60; here it is the text that it looks like."""
    for text in ("{mask: {layers: [{match: a, pattern: 1:4}]}}", "mask:\n  layers:\n  - match: a\n    pattern: 1:4"):
        assert recipes.build(recipes.parse(text)).mask.layers[0].pattern == "1:4"
    numbers = {"0x10": 16, "1_000": 1000, "-3": -3, "1.5": 1.5, ".5": 0.5, "1e3": 1000.0, "2.e1": 20.0}
    assert {text: recipes.parse_value(text) for text in numbers} == numbers
    assert recipes.parse_value("12:30:45") == "12:30:45"


def test_cached_losses_and_timesteps_that_move_do_not_go_together():
    changes = {"mask": {"method": "reinforce", "cached_batches": 2}, "train": {"timesteps": "importance"}}
    with pytest.raises(RecipeError, match=r"train.timesteps=importance would change; use uniform"):
        recipes.build(changes)


@pytest.mark.parametrize(
    "text", ["- a\n- b", "just words", "a: [1, 2", "a: !!python/object:os.system {}", "mask: 3", "seed: 1\nseed: 2"]
)
def test_documents_that_are_no_recipe_are_refused(text):
    with pytest.raises(RecipeError) as caught:
        recipes.build(recipes.parse(text))
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_said(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            recipes.read(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipes.read(tmp_path / "binary.yaml")


def test_later_sources_win(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("mask: {n: 1}\nname: file")
    found = recipes.resolve(path, "smoke", ["mask.m=8", "mask.steps=7"], "last")
    assert (found.mask.n, found.mask.m, found.mask.steps, found.name) == (1, 8, 7, "last")
    assert found.data.batch_size == recipes.build(recipes.preset("smoke")).data.batch_size


@pytest.mark.parametrize("name", recipes.PRESETS)
def test_presets_are_valid_and_survive_yaml(name):
    found = recipes.build(recipes.preset(name))
    assert recipes.build(recipes.parse(found.to_yaml())) == found


def test_differences_name_only_what_differs():
    other = recipes.resolve(assignments=["mask.n=1", "train.lr=1e-3"])
    assert recipes.differences(Recipe(), other) == {"mask.n": (2, 1), "train.lr": (2e-4, 1e-3)}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*recipes.flatten(Recipe().model_dump()), "mask", "prune", "x", "mask.x"]), values)
def test_any_value_anywhere_is_accepted_or_refused_in_one_line(path, value):
    document = value
    for key in reversed(path.split(".")):
        document = {key: document}
    try:
        recipes.build(document)
    except RecipeError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
