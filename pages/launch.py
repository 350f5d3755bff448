"""Launch: the whole recipe as a form, with what it will do to the model."""

import streamlit as st

from app import forms, lab, parts
from prunedm import recipe as recipes
from prunedm.recipe import Recipe, RecipeError


def presets() -> None:
    columns = st.columns(len(recipes.PRESETS))
    for column, name in zip(columns, recipes.PRESETS):
        if column.button(name.capitalize(), help=forms.PRESET_HELP[name], width="stretch"):
            forms.fill(recipes.build(recipes.preset(name)))
        column.caption(forms.PRESET_HELP[name])


def current() -> Recipe | None:
    """The form's recipe, or None with the fault said."""
    try:
        return recipes.build(forms.fields())
    except RecipeError as error:
        st.error(parts.plain(error))
        return None


def relevant(recipe: Recipe) -> Recipe:
    """The recipe with all that sizes do not depend on put back to its default, so that edits of the
    rest find the prediction in the cache."""
    kept = {
        "model": recipe.model,
        "prune": recipe.prune.model_copy(update={"finetune_steps": 0, "rounds": 1, "round_steps": 50}).model_dump(),
        "mask": {"n": recipe.mask.n, "m": recipe.mask.m, "layers": recipe.mask.layers, "density": recipe.mask.density},
        "seed": recipe.seed if recipe.prune.method == "random" else 0,
    }
    if recipe.mask.method == "none":
        kept["mask"]["method"] = "none"
    return Recipe.model_validate(kept)


def prediction(recipe: Recipe) -> bool:
    """Sizes and layers that this recipe will lead to; False when it cannot run."""
    st.subheader("What this will do")
    try:
        found = lab.preview(relevant(recipe).model_dump_json(), str(lab.runs_dir()))
    except (ValueError, OSError) as error:
        st.error(parts.plain(error))
        return False
    sizes, macs = found["parameters"], found["macs"]
    dense, structured, nonzero = sizes["dense"], sizes["structured"], sizes["nm_nonzero"]
    change = macs["structured"] / macs["dense"] - 1
    boxes = [
        ("Parameters, dense", f"{dense:,}", None),
        ("after stage 1", f"{structured:,}", f"{structured / dense - 1:.1%}"),
        ("non-zero after stage 2", f"{nonzero:,}", f"{nonzero / dense - 1:.1%}"),
        ("MACs an image after stage 1", f"{macs['structured'] / 1e6:,.0f} M", f"{change:.1%}"),
    ]
    for column, (label, value, delta) in zip(st.columns(4), boxes):
        column.metric(label, value, delta, "inverse", border=True)
    stage_one(recipe, found["prune"])
    layers(recipe, found)
    return True


def stage_one(recipe: Recipe, pruned: dict | None) -> None:
    """What the prediction of stage 1 rests on, and whether its target can be met."""
    if pruned is None:
        return
    if pruned["method"] != recipe.prune.method:
        st.caption(f"Predicted with magnitude's ranking: {recipe.prune.method} looks at images when the run begins.")
    if pruned["of"] != recipe.prune.of:
        st.caption(f"Predicted for {pruned['of']}: latency is measured when the run begins.")
    if pruned["reason"]:
        st.warning(f"The target of {recipe.prune.target:.0%} is not met: {pruned['reason']}.")


def layers(recipe: Recipe, found: dict) -> None:
    masked = [layer for layer in found["layers"] if layer["eligible"]]
    patterns = ", ".join(sorted({layer["pattern"] for layer in masked}))
    if recipe.mask.density is not None:
        patterns = "N:M (each layer's pattern is chosen by its measured sensitivity when the run begins)"
    with st.expander(f"Layers: {len(masked)} of {len(found['layers'])} will carry {patterns} masks"):
        st.dataframe(
            [
                {
                    "layer": layer["layer"],
                    "kind": layer["kind"],
                    "shape after stage 1": " x ".join(map(str, layer["shape"])),
                    "pattern": layer["pattern"] if recipe.mask.density is None else "",
                    "groups": layer["groups"],
                    "masked": "yes" if layer["eligible"] else "no",
                    "why not": layer["reason"],
                }
                for layer in found["layers"]
            ],
            hide_index=True,
        )


st.title("Launch")
if forms.key("name") not in st.session_state:
    forms.fill(recipes.build(recipes.preset("smoke")))
presets()
chosen = current()
if chosen is not None and prediction(chosen):
    if st.button("Start", type="primary", icon="▶️", shortcut="Ctrl+Enter"):
        with parts.said():
            lab.start(chosen)
    st.subheader("The same on the command line")
    st.code(forms.command_line(chosen, lab.runs_dir()), language="bash", wrap_lines=True)
    with st.expander("Recipe as YAML"):
        st.code(chosen.to_yaml(), language="yaml")
with parts.said():
    lab.jobs()
