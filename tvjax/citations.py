"""What to cite: the papers behind every method, as BibTeX."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tvjax.kinds import kind_of


class Paper(NamedTuple):
    """A paper; `eprint` is its number on arXiv, `venue` where it was published."""

    title: str
    author: str
    year: int
    eprint: str = ""
    venue: str = ""


_PAPERS = {
    "tvjax": Paper("tvjax: task vectors in JAX", "{The tvjax authors}", 2026),
    "ilharco2023editing": Paper(
        "Editing Models with Task Arithmetic", "Ilharco, Gabriel and others", 2023, "2212.04089", "ICLR"
    ),
    "rinaldi2026gradient": Paper(
        "Gradient-Sign Masking for Task Vector Transport Across Pre-Trained Models",
        "Rinaldi, Filippo and others", 2026, "2510.09658", "ICLR",
    ),
    "rinaldi2026transporting": Paper(
        "Transporting Task Vectors across Different Architectures without Training",
        "Rinaldi, Filippo and others", 2026, "2602.12952", "ICML",
    ),
    "son2026bilinear": Paper(
        "Bilinear Coordinate Alignment for Training-Free Task-Vector Transfer",
        "Son and others", 2026, "2605.28444",
    ),
    "rinaldi2025update": Paper(
        "Update Your Transformer to the Latest Release: Re-Basin of Task Vectors",
        "Rinaldi, Filippo and others", 2025, "2505.22697", "ICML",
    ),
    "ainsworth2023git": Paper(
        "Git Re-Basin: Merging Models modulo Permutation Symmetries",
        "Ainsworth, Samuel K. and Hayase, Jonathan and Srinivasa, Siddhartha", 2023, "2209.04836", "ICLR",
    ),
    "wortsman2022model": Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
        "time", "Wortsman, Mitchell and others", 2022, "2203.05482", "ICML",
    ),
    "shoemake1985animating": Paper("Animating rotation with quaternion curves", "Shoemake, Ken", 1985, "", "SIGGRAPH"),
    "karcher1977riemannian": Paper(
        "Riemannian center of mass and mollifier smoothing", "Karcher, Hermann", 1977, "",
        "Communications on Pure and Applied Mathematics",
    ),
    "yadav2023ties": Paper(
        "TIES-Merging: Resolving Interference When Merging Models", "Yadav, Prateek and others", 2023, "2306.01708",
        "NeurIPS",
    ),
    "yu2024language": Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "Yu, Le and others", 2024, "2311.03099", "ICML",
    ),
    "deep2024della": Paper(
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        "Deep, Pala Tej and Bhardwaj, Rishabh and Poria, Soujanya", 2024, "2406.11617",
    ),
    "davari2024model": Paper(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "Davari, MohammadReza and Belilovsky, Eugene", 2024, "2312.06795", "ECCV",
    ),
    "jang2024model": Paper(
        "Model Stock: All we need is just a few fine-tuned models",
        "Jang, Dong-Hwan and Yun, Sangdoo and Han, Dongyoon", 2024, "2403.19522", "ECCV",
    ),
    "wan2024fusechat": Paper("FuseChat: Knowledge Fusion of Chat Models", "Wan, Fanqi and others", 2024, "2408.07990"),
    "gargiulo2025task": Paper(
        "Task Singular Vectors: Reducing Task Interference in Model Merging", "Gargiulo, Antonio Andrea and others",
        2025, "2412.00081", "CVPR",
    ),
    "marczak2025no": Paper(
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        "Marczak, Daniel and others", 2025, "2502.04959", "ICML",
    ),
    "stoica2025model": Paper(
        "Model merging with SVD to tie the Knots", "Stoica, George and others", 2025, "2410.19735", "ICLR"
    ),
    "cheng2025whoever": Paper(
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        "Cheng, Runxi and others", 2025, "2503.08099", "ICML",
    ),
    "panariello2025accurate": Paper(
        "Accurate and Efficient Low-Rank Model Merging in Core Space", "Panariello, Aniello and others", 2025,
        "2509.17786", "NeurIPS",
    ),
    "jin2023dataless": Paper(
        "Dataless Knowledge Fusion by Merging Weights of Language Models", "Jin, Xisen and others", 2023, "2212.09849",
        "ICLR",
    ),
    "matena2022merging": Paper(
        "Merging Models with Fisher-Weighted Averaging", "Matena, Michael and Raffel, Colin", 2022, "2111.09832",
        "NeurIPS",
    ),
    "zhang2024knowledge": Paper(
        "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", "Zhang, Frederic Z. and others",
        2024, "2407.02880", "NeurIPS",
    ),
    "yang2024adamerging": Paper(
        "AdaMerging: Adaptive Model Merging for Multi-Task Learning", "Yang, Enneng and others", 2024, "2310.02575",
        "ICLR",
    ),
    "wang2025lines": Paper(
        "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", "Wang, Ke and others",
        2025, "2410.17146", "ICLR",
    ),
    "li2026when": Paper(
        "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", "Li, Yayuan and others", 2026,
        "2602.05536", "ICML",
    ),
    "xu2026ace": Paper(
        "ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation", "Xu, Bo and others", 2026,
        "2603.02945", "CVPR",
    ),
    "nguyen2026regmean": Paper(
        "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
        "Nguyen and others", 2026, "2508.03121", "TMLR",
    ),
    "goddard2024arcee": Paper(
        "Arcee's MergeKit: A Toolkit for Merging Large Language Models", "Goddard, Charles and others", 2024,
        "2403.13257",
    ),
}  # fmt: skip

_BEHIND: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("task_vector", "apply", "naive", "identity", "task_arithmetic"), ("ilharco2023editing",)),
    **dict.fromkeys(("orthogonal_shift", "ariadne", "logit_correction"), ()),  # no papers of their own
    "gradfix": ("rinaldi2026gradient",),
    "theseus": ("rinaldi2026transporting",),
    "bico": ("son2026bilinear",),
    "transfusion": ("rinaldi2025update", "ainsworth2023git"),
    "average": ("wortsman2022model",),
    "slerp": ("shoemake1985animating",),
    "karcher_mean": ("karcher1977riemannian",),
    "ties": ("yadav2023ties",),
    "dare": ("yu2024language",),
    "della": ("deep2024della",),
    "breadcrumbs": ("davari2024model",),
    "model_stock": ("jang2024model",),
    "sce": ("wan2024fusechat",),
    "tsv_m": ("gargiulo2025task",),
    **dict.fromkeys(("iso_c", "iso_cts"), ("marczak2025no",)),
    "knots": ("stoica2025model",),
    "wudi": ("cheng2025whoever",),
    "core_space": ("panariello2025accurate",),
    "lines": ("wang2025lines",),
    "svc": ("li2026when",),
    "ace": ("xu2026ace",),
    **dict.fromkeys(("nuslerp", "multi_slerp"), ("goddard2024arcee",)),
    "regmean": ("jin2023dataless",),
    "regmean_plus_plus": ("nguyen2026regmean", "jin2023dataless"),
    "fisher": ("matena2022merging",),
    **dict.fromkeys(("compose", "few_shot", "addition", "negation", "fix_match"), ("zhang2024knowledge",)),
    "entropy": ("zhang2024knowledge", "yang2024adamerging"),
}


def cite(*methods: Any) -> str:
    """The papers to cite for what was used, and tvjax itself, as BibTeX.

    Args:
      methods: names of transports, merges and objectives (``"bico"``, ``"ties"``, ``"compose"``, chains
        ``"bico+gradfix"``), or transports themselves; none gives tvjax alone.

    Raises:
      ValueError: a name that is none of these.

    >>> print(cite("iso_c"))
    @misc{tvjax,
      title = {tvjax: task vectors in JAX},
      author = {{The tvjax authors}},
      year = {2026}
    }
    <BLANKLINE>
    @misc{marczak2025no,
      title = {No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces},
      author = {Marczak, Daniel and others},
      year = {2025},
      note = {ICML},
      eprint = {2502.04959},
      archivePrefix = {arXiv}
    }
    """
    keys = ["tvjax", *(key for name in _names(methods) for key in papers_behind(name))]
    return "\n\n".join(_entry(key, _PAPERS[key]) for key in dict.fromkeys(keys))


def papers_behind(method: str) -> tuple[str, ...]:
    """BibTeX keys of the papers of a method; none for one's own.

    Raises:
      ValueError: an unknown method.
    """
    if method not in _BEHIND:
        raise ValueError(f"no citation is known of {method!r}: choose among {', '.join(sorted(_BEHIND))}")
    return _BEHIND[method]


def is_cited(method: str) -> bool:
    """Whether `cite` knows a method."""
    return all(name in _BEHIND for name in _names([method]))


def _names(methods: Iterable[Any]) -> list[str]:
    """The names of methods, those of a chain one by one; what only scales has no paper."""
    names: list[str] = []
    for method in methods:
        links = getattr(method, "links", None)
        if links is None and not isinstance(method, str):
            raise ValueError(f"found {kind_of(method)}, expected the name of a method or a transport")
        names += method.split("+") if links is None else [link.name for link in links]
    return [name for name in names if name != "scale_by"]


def _entry(key: str, paper: Paper) -> str:
    fields = {"title": paper.title, "author": paper.author, "year": str(paper.year)}
    if paper.venue:
        fields["note"] = paper.venue
    if paper.eprint:
        fields |= {"eprint": paper.eprint, "archivePrefix": "arXiv"}
    return f"@misc{{{key},\n" + ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items()) + "\n}"
