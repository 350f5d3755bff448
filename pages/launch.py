"""Launch: the whole recipe as a form, with what it will do to the model."""

import streamlit as st

from app import forms, lab, launch_views, parts
from prunedm import recipe as recipes
from prunedm.recipe import Recipe, RecipeError


def presets() -> None:
    columns, in_use = st.columns(len(recipes.PRESETS)), forms.preset_of(forms.held())
    for column, name in zip(columns, recipes.PRESETS):
        if column.button(name.capitalize(), help=forms.PRESET_HELP[name], width="stretch"):
            forms.fill(recipes.build(recipes.preset(name)))
        column.caption(("**✔ in the form** · " if name == in_use else "") + forms.PRESET_HELP[name])


def current(cards: list[lab.Card]) -> Recipe | None:
    """The form's recipe; None with the fault said above the form and beside its field."""
    document = forms.held()
    wrong = forms.faults(document)
    if wrong:
        try:
            recipes.build(document)
        except RecipeError as error:
            st.error(parts.plain(error))
    drawn, beside_data = forms.fields(wrong, launch_views.sources(cards))
    try:
        recipe = recipes.build(drawn)
    except RecipeError as error:
        if not wrong:
            st.error(parts.plain(error))
        return None
    with beside_data:
        launch_views.data_images(recipe)
    return recipe


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


def prediction(recipe: Recipe, cards: list[lab.Card]) -> bool:
    """Sizes, time and layers that this recipe will lead to; False when it cannot run."""
    st.subheader("What this will do")
    try:
        found = lab.preview(relevant(recipe).model_dump_json(), str(lab.runs_dir()))
        launch_views.sizes(recipe, found)
    except (ValueError, OSError) as error:
        st.error(parts.plain(error))
        return False
    stage_one(recipe, found["prune"])
    launch_views.time_needed(recipe, found["macs"], cards)
    launch_views.layers(recipe, found)
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


def elsewhere(recipe: Recipe) -> None:
    """The same run outside the form: as a command and as a file."""
    st.subheader("The same on the command line")
    st.code(forms.command_line(recipe, lab.runs_dir()), language="bash", wrap_lines=True)
    with st.expander("Recipe as YAML"):
        text = recipe.to_yaml()
        st.download_button("Download", text, f"{recipe.name}.yaml", "application/yaml", on_click="ignore")
        st.code(text, language="yaml", wrap_lines=True)


st.title("Launch")
if forms.key("name") not in st.session_state:
    forms.fill(recipes.build(recipes.preset("smoke")))
all_cards = lab.cards()
presets()
launch_views.origins(all_cards)
chosen = current(all_cards)
if chosen is not None and prediction(chosen, all_cards):
    if st.button("Start", type="primary", icon="▶️", shortcut="Ctrl+Enter"):
        with parts.said():
            lab.start(chosen)
    elsewhere(chosen)
with parts.said():
    launch_views.queue(all_cards)
    lab.jobs()
