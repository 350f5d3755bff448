"""Launch: the whole recipe as a form, with what it will do to the model."""

import streamlit as st

from app import forms, lab
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
        st.error(str(error))
        return None


def prediction(recipe: Recipe) -> bool:
    """Sizes and layers that this recipe will lead to; False when it cannot run."""
    st.subheader("What this will do")
    relevant = recipe.model_dump()
    neutral = Recipe().model_dump()
    for section in ("data", "train", "eval"):
        relevant[section] = neutral[section]
    relevant["name"] = neutral["name"]
    try:
        found = lab.preview(Recipe.model_validate(relevant).model_dump_json(), str(lab.runs_dir()))
    except ValueError as error:
        st.error(str(error))
        return False
    sizes, macs = found["parameters"], found["macs"]
    dense = sizes["dense"]
    a, b, c, d = st.columns(4)
    a.metric("Parameters, dense", f"{dense:,}", border=True)
    b.metric("after stage 1", f"{sizes['structured']:,}", f"{sizes['structured'] / dense - 1:.1%}", "inverse", border=True)
    c.metric("non-zero after stage 2", f"{sizes['nm_nonzero']:,}", f"{sizes['nm_nonzero'] / dense - 1:.1%}", "inverse", border=True)
    change = macs["structured"] / macs["dense"] - 1
    d.metric("MACs an image after stage 1", f"{macs['structured'] / 1e6:,.0f} M", f"{change:.1%}", "inverse", border=True)
    if found["prune"] and found["prune"]["reason"]:
        st.warning(f"The target of {recipe.prune.target:.0%} is not met: {found['prune']['reason']}.")
    layers(recipe, found)
    return True


def layers(recipe: Recipe, found: dict) -> None:
    masked = [layer for layer in found["layers"] if layer["eligible"]]
    with st.expander(f"Layers: {len(masked)} of {len(found['layers'])} will carry {recipe.mask.n}:{recipe.mask.m} masks"):
        st.dataframe(
            [
                {
                    "layer": layer["layer"],
                    "kind": layer["kind"],
                    "shape after stage 1": " x ".join(map(str, layer["shape"])),
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
        try:
            lab.start(chosen)
        except ValueError as error:
            st.error(str(error))
    st.subheader("The same on the command line")
    st.code(forms.command_line(chosen), language="bash", wrap_lines=True)
    with st.expander("Recipe as YAML"):
        st.code(chosen.to_yaml(), language="yaml")
lab.jobs()
