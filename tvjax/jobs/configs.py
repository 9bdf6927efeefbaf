"""The configs of the jobs; light to import, for the command line is made of them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, Field, model_validator

from tvjax.jobs.schema import Config, File, Several, Typed
from tvjax.kinds import as_bytes

LARGEST_SEED = 2**31 - 1
LARGEST_SCALE = 3.4028234e38  # of float32
LARGEST_COUNT = 2**20  # of what arrays are made for
SOURCES = (
    "a folder with one folder a class, an archive FILE.npz, a dataset hf:NAME?split=SPLIT, or digits:STYLE/PART; "
    "for models of texts FILE.jsonl, .csv, .tsv or .txt, hf:NAME?text=COLUMN; "
    "?part=0:0.8 takes a share of them"
)
TRANSPORTS = ("naive", "orthogonal_shift", "gradfix", "theseus", "bico", "ariadne")  # and one's own, by register
MERGES = (
    *("average", "task_arithmetic", "slerp", "nuslerp", "multi_slerp", "karcher_mean", "ties", "dare", "della"),
    *("breadcrumbs", "model_stock", "sce", "tsv_m", "iso_c", "iso_cts", "knots", "wudi", "ace", "core_space"),
    *("lines", "svc"),
)

MODEL, FILE, FOLDER, NUMBERS = Typed("MODEL"), Typed("FILE"), Typed("FOLDER"), Typed("NUMBERS")
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED, description="Of every draw.")]
BatchSize = Annotated[int, Field(ge=1, le=LARGEST_COUNT, description="Examples at once.")]
AnyBase = Annotated[bool, Field(description="Take task vectors although they were made for another model.")]
DType = Literal["float32", "float16", "bfloat16"]


def _json(options: dict[str, Any]) -> dict[str, Any]:
    """Options that a recipe can hold; what they may be is the method's to say."""
    for name, value in options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options.{name}: found {value!r}; input was not a valid JSON value") from error
    return options


def _in_float32(scale: float) -> float:
    if abs(scale) > LARGEST_SCALE:
        raise ValueError(f"scale: {scale:g} is beyond the range of float32, in which weights are added")
    return scale


def _shard_size(size: str) -> str:
    as_bytes(size)
    return size


Scale = Annotated[float, AfterValidator(_in_float32)]
ShardSize = Annotated[str, AfterValidator(_shard_size), Typed("SIZE")]
Options = Annotated[
    dict[str, Any],
    AfterValidator(_json),
    Typed("NAME=VALUE"),
    Field(description="A hyperparameter of the method, such as rank=0.25; may be repeated."),
]
AllowConfigDifferences = Annotated[
    bool,
    Field(
        description="Subtract the weights of models whose configs differ in what they compute (activation, heads, "
        "epsilon)."
    ),
]


class Examples(Config):
    """Examples, and what their classes are called."""

    data: Annotated[
        str | None,
        Typed("DATA"),
        Field(
            validation_alias=AliasChoices("data", "images"),
            description=f"The examples: {SOURCES}. Default: those of --task.",
        ),
    ] = None
    task: Annotated[str | None, Typed("NAME")] = None
    """Class names, prompts and images: sun397, cars, resisc45, eurosat, svhn, gtsrb, mnist, dtd; or digits. Of texts:
    cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, snli, scitail."""
    classes: Annotated[File | None, FILE] = None
    """Class names, one a line, in the labels' order; default: of the task, head or images."""
    templates: Annotated[File | None, FILE] = None
    """Prompts with {} for the name, one a line; for a language model one, with {} or {column} for the text. Default: of
    the task, or 'a photo of a {}.' for images; a sentence encoder reads the names alone, a language model the text
    alone, and is asked whether the class name (or with --task its answer) comes next."""
    length: Annotated[int, Field(ge=1, le=LARGEST_COUNT)] = 512
    """Tokens that are kept of a text."""


class Drawn(Examples):
    """Some examples of each class."""

    per_class: Annotated[int, Field(ge=0)] = 0
    """Examples of each class to draw; 0: all."""
    select: Literal["random", "herding", "k_medoids"] = "random"
    """How --per-class draws: at random, or by the model's own embeddings."""
    seed: Seed = 0


class Moving(Drawn):
    """What a transport and its plan have in common."""

    source: Annotated[str, MODEL]
    """The pre-trained source: folder, hub id or id@revision."""
    target: Annotated[str, MODEL]
    """The model to move the task into."""
    method: Annotated[
        str | None,
        Field(
            description=f"One of {', '.join(TRANSPORTS)}; or a chain such as bico+gradfix. Default: the recommended "
            "one, bico with labelled examples, theseus with others, naive without any where the shapes agree."
        ),
    ] = None
    options: Options = {}
    part: Annotated[str | None, Typed("PART")] = None
    """The part of the model that is moved; default: the vision tower of a CLIP, of another model all but its head."""
    scale: Scale = 1.0
    """Factor of the moved task vector."""
    validation: Annotated[str | None, Typed("DATA")] = None
    """Labelled examples on which the scale is chosen, in the place of --scale."""
    batch_size: BatchSize = 32
    depth: str = "uniform"
    """Source layer of each target layer: uniform, cka (by likeness), or a list such as 0,0,1,1."""
    tokens: Literal["interpolate", "class_token", "mean"] = "interpolate"
    """How activations are compared where the patch grids differ."""
    refine: Literal["correction", "distillation"] | None = None
    """Let the fine-tuned source teach the target from there on, by its scores of the classes of the same examples,
    which need no labels: by the closed form (tv.logit_correction), or by training as compose --teacher does. The scale
    of the start is that of the least loss; --validation chooses the rate and the epoch of a training."""
    maps: Annotated[File | None, FOLDER] = None
    """Keep the fitted maps here, stage by stage: an interrupted run goes on, and a later one, with another scale or
    another fine-tuned model, starts from them; ariadne fits the task vector itself, which no other starts from."""
    save_task_vector: Annotated[File | None, FILE] = None
    """Also write the moved task vector, unscaled, for the target."""
    task_vector: Annotated[str | None, Typed("PATH")] = None
    """In the place of --finetuned: a LoRA adapter of PEFT for the source (folder or hub id), which comes out as an
    adapter of the same rank for the target where the method keeps its form; or a task vector (.safetensors)."""
    dense: bool = False
    """Write the edited model, not an adapter for it."""
    stream: bool = False
    """Leave the models on disk: a stage's weights are read when it is fitted, and the moved ones written as they are
    made. For models that are larger than memory. The scale is given (--scale), not chosen; with --maps a run that was
    killed goes on."""
    allow_config_differences: AllowConfigDifferences = False
    any_base: AnyBase = False

    @model_validator(mode="after")
    def _has_a_method(self) -> Moving:
        if self.options and self.method is None:
            raise ValueError(f"--options are those of a method, found {', '.join(self.options)}: give --method too")
        return self

    @model_validator(mode="after")
    def _can_refine(self) -> Moving:
        if self.refine is None:
            return self
        if self.task_vector is not None:
            raise ValueError(
                "--refine learns from the fine-tuned source: give --finetuned in the place of --task-vector"
            )
        if self.stream:
            raise ValueError("--refine teaches the whole target, in memory: leave --stream or --refine out")
        if self.scale != 1:
            raise ValueError(f"--refine finds the scale of its start itself: leave --scale {self.scale:g} out")
        return self

    @model_validator(mode="after")
    def _has_one_scale(self) -> Moving:
        if self.validation is not None and self.scale != 1:
            raise ValueError(f"--validation chooses the scale: leave --scale {self.scale:g} or --validation out")
        return self

    @model_validator(mode="after")
    def _can_stream(self) -> Moving:
        whole = "the whole moved task vector, and --stream writes its leaves as they are made:"
        if self.stream and self.validation is not None:
            raise ValueError(
                f"--validation chooses a scale with {whole} give --scale in its place, or leave --stream out"
            )
        if self.stream and self.save_task_vector is not None:
            raise ValueError(
                f"--save-task-vector writes {whole} leave one of the two out (tvjax extract makes it of the target and "
                "the edited model)"
            )
        return self


class TransportConfig(Moving):
    """What `tvjax.jobs.transport` moves: the task of one model into another.

    >>> TransportConfig(source="a", finetuned="b", target="c", method="theseus", data="photos", output="edited").scale
    1.0
    """

    finetuned: Annotated[str | None, MODEL] = None
    """The fine-tuned source; the part of it that is moved suffices."""
    output: Annotated[File, FOLDER]
    """Where the edited target goes, or the adapter for it."""

    @model_validator(mode="after")
    def _one_of_two(self) -> TransportConfig:
        if (self.finetuned is None) == (self.task_vector is None):
            raise ValueError("give either --finetuned, a model, or --task-vector, an adapter or a task vector")
        return self


class PlanConfig(Moving):
    """What `tvjax.jobs.plan` says of a transport; takes what a transport takes, and less is needed."""

    finetuned: Annotated[str | None, MODEL] = None
    """The fine-tuned source; checked where it is given."""
    output: Annotated[File | None, FOLDER] = None
    """Checked, as the transport would; nothing is written."""
    count: Annotated[int, Field(ge=1)] = 8
    """Examples to reckon with where none are given."""
    compare: bool = False
    """Also run both models on the examples, and say how alike their blocks are: whether it is worth it."""


class EvaluateConfig(Examples):
    """What `tvjax.jobs.evaluate` measures: models on the same examples."""

    models: Annotated[Several[str], Typed("MODEL...", argument=True), Field(min_length=1)]
    """Folders or hub ids: CLIPs and ViTs, or models of texts: language models, sentence encoders, sequence classifiers.
    A vision tower alone goes with the text tower of the first full CLIP."""
    reference: Annotated[str | None, MODEL] = None
    """A fine-tuned model: accuracies are given as shares of its own too."""
    task_vector: Annotated[File | None, FILE] = None
    """Add this task vector to the one MODEL, at every scale."""
    scales: Annotated[str | None, NUMBERS] = None
    """Such as 0,0.25,0.5; default: 0 to 1 by 0.05."""
    any_base: AnyBase = False
    batch_size: BatchSize = 64
    output: Annotated[File | None, FILE] = None
    """Also write the results as JSON."""
    plot: Annotated[File | None, FILE] = None
    """Also draw the accuracy by scale, as a PNG (--task-vector)."""
    harness: Annotated[Several[str], Typed("TASK")] = ()
    """Measure language models on tasks of lm-evaluation-harness instead, where it is installed, such as arc_easy."""
    options: Options = {}

    @model_validator(mode="after")
    def _of_one_kind(self) -> EvaluateConfig:
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"a model is given twice: {', '.join(self.models)}")
        if self.harness and (self.data or self.task or self.task_vector or self.reference):
            raise ValueError("--harness brings its own examples: leave out --data, --task, --task-vector, --reference")
        if self.options and not self.harness:
            raise ValueError("--options are those of the harness: give --harness")
        if self.task_vector is None and (self.scales is not None or self.plot is not None):
            raise ValueError("--scales and --plot are about a task vector: give --task-vector")
        if self.task_vector is not None and len(self.models) > 1:
            raise ValueError(f"--task-vector is added to one model, found {len(self.models)}: {', '.join(self.models)}")
        return self


class ComposeConfig(Drawn):
    """What `tvjax.jobs.compose` learns: coefficients of task vectors of one model."""

    task_vectors: Annotated[Several[File], Typed("FILE...", argument=True), Field(min_length=1)]
    """Task vectors of the model."""
    model: Annotated[str, MODEL]
    """The pre-trained model: folder or hub id."""
    output: Annotated[File, FOLDER]
    """Where the edited model goes."""
    objective: Literal["few_shot", "entropy", "fix_match", "distillation"] | None = None
    """few_shot learns from labelled examples; distillation from --teacher, and with few_shot both are learned from;
    entropy and fix_match need neither. Default: distillation where there is a teacher, else few_shot."""
    teacher: Annotated[str | None, MODEL] = None
    """A model that was fine-tuned for the classes, such as the fine-tuned source of a transport: its scores of the
    examples are learned from, in the place of labels. It may be of another family, resolution and tokenizer."""
    teacher_base: Annotated[str | None, MODEL] = None
    """The pre-trained model whose head the teacher was fine-tuned with: of a vision tower alone the full CLIP, of a
    sentence encoder the encoder before. Default: the teacher's own."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the teacher's soft labels."""
    match: Literal["probabilities", "logits"] = "probabilities"
    """What is to be like the teacher's: probabilities (cross-entropy) or centred logits (mean squared error)."""
    blocks: Literal["leaf", "vector"] = "leaf"
    """One coefficient for each leaf, or for each vector."""
    partitions: Annotated[int, Field(ge=1, le=LARGEST_COUNT)] = 1
    """Random parts of each block, a coefficient each."""
    start: Literal["best", "zero"] | None = None
    """best: from the one vector and scale of the least loss on the examples. Default: best with labels or a teacher."""
    tune: bool | None = None
    """Train the leaves that the vectors move too, at 1 % of the rate. Default: with labels or a teacher."""
    validation: Annotated[str | None, Typed("DATA")] = None
    """Labelled examples by which learning rate and epoch are chosen."""
    learning_rate: Annotated[Several[Annotated[float, Field(gt=0)]], Typed("RATE")] = ()
    """One, or several to choose from."""
    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the examples, at most."""
    batch_size: BatchSize = 128
    micro_batches: Annotated[int, Field(ge=1)] = 1
    """Pieces of a batch, to save memory."""
    flip: bool = True
    """Whether a mirrored image is of the same class (fix_match)."""
    state: Annotated[File | None, FOLDER] = None
    """Keep the training's state here; a later run goes on."""
    any_base: AnyBase = False

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try: as published, or several where there is something to choose by."""
        if self.learning_rate:
            return self.learning_rate
        if self.validation is None:
            return (0.1,) if self.is_told else (1e-3,)
        return (0.03, 0.1, 0.3) if self.is_told else (1e-3, 1e-2)

    @property
    def learned_by(self) -> str:
        """The objective: the one that is asked for, or that which there is something to learn from."""
        return self.objective or ("few_shot" if self.teacher is None else "distillation")

    @property
    def is_told(self) -> bool:
        """Whether somebody, labels or teacher, says what is right."""
        return self.learned_by in ("few_shot", "distillation")

    @model_validator(mode="after")
    def _has_a_teacher(self) -> ComposeConfig:
        if self.teacher is None:
            fields = type(self).model_fields
            alone = [
                name for name in ("teacher_base", "temperature", "match") if getattr(self, name) != fields[name].default
            ]
            if self.objective == "distillation":
                raise ValueError("distillation learns from a teacher: give --teacher, a fine-tuned model")
            if alone:
                raise ValueError(f"--{alone[0].replace('_', '-')} is about a teacher: give --teacher")
        elif not self.is_told:
            raise ValueError(f"{self.objective} learns from no teacher: leave --teacher or --objective out")
        return self

    @model_validator(mode="after")
    def _has_pieces(self) -> ComposeConfig:
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"--micro-batches {self.micro_batches} does not divide a batch of {self.batch_size} examples: choose "
                "another, or another --batch-size"
            )
        return self

    @model_validator(mode="after")
    def _can_choose(self) -> ComposeConfig:
        if len(self.rates) > 1 and self.validation is None:
            raise ValueError(f"{len(self.rates)} learning rates need labelled examples to choose by: give --validation")
        return self


class MergeConfig(Config):
    """What `tvjax.jobs.merge` merges: task vectors of one model."""

    task_vectors: Annotated[Several[File], Typed("FILE...", argument=True), Field(min_length=1)]
    """Task vectors of one model: files; or with --model folders of LoRA adapters, or of models fine-tuned from it."""
    method: Annotated[str, Field(description=f"One of {', '.join(MERGES)}.")]
    output: Annotated[File, Typed("PATH")]
    """A task vector (.safetensors); or, with --model, a folder: of the edited model, or of an adapter where all inputs
    are adapters and the method keeps their form (core_space, average, task_arithmetic)."""
    rank: Annotated[int | None, Field(ge=1)] = None
    """Write an adapter of this rank at most, by truncated singular value decomposition."""
    dense: bool = False
    """Of adapters too, write the edited model."""
    options: Options = {}
    model: Annotated[str | None, MODEL] = None
    """The pre-trained model, to add the merged task vector to."""
    scale: Scale = 1.0
    """Factor of the merged task vector."""
    seed: Seed = 0
    dtype: DType = "float32"
    """Of the task vector."""
    any_base: AnyBase = False


class ExtractConfig(Config):
    """What `tvjax.jobs.extract` writes: the task vector of a fine-tuning."""

    pretrained: Annotated[str, MODEL]
    """The model before fine-tuning: folder or hub id."""
    output: Annotated[File, Typed("PATH")]
    """Where the task vector goes (.safetensors); with --rank or --energy, the folder of the adapter."""
    finetuned: Annotated[str | None, MODEL] = None
    """The fine-tuned model; the part that is taken suffices."""
    adapter: Annotated[str | None, FOLDER] = None
    """A LoRA adapter of PEFT instead: folder or hub id."""
    part: Annotated[str | None, Typed("PART"), Field(validation_alias=AliasChoices("part", "subtree"))] = None
    """The part of the model to take, such as text; '' for all of it. Default: vision of a CLIP or a ViT, all of another
    model."""
    rank: Annotated[int | None, Field(ge=1)] = None
    """Write the best LoRA adapter of this rank, as PEFT loads it; with --energy too, of this rank at most."""
    energy: Annotated[float | None, Field(gt=0, le=1)] = None
    """Write the LoRA adapter of the least ranks that hold this share of each layer's squared norm, --rank at most."""
    seed: Seed = 0
    dtype: DType = "float32"
    """Of the task vector."""
    allow_config_differences: AllowConfigDifferences = False
    any_base: AnyBase = False

    @model_validator(mode="after")
    def _one_of_two(self) -> ExtractConfig:
        if (self.finetuned is None) == (self.adapter is None):
            raise ValueError("give either --finetuned, a model, or --adapter, a LoRA adapter of PEFT")
        low = self.rank is not None or self.energy is not None
        if low and self.finetuned is None:
            raise ValueError("--rank and --energy make an adapter of a fine-tuned model: give --finetuned")
        if low and self.output.suffix == ".safetensors":
            raise ValueError(
                f"--output is {str(self.output)!r}, and an adapter is a folder: give a name without suffix"
            )
        return self


class ApplyConfig(Config):
    """What `tvjax.jobs.apply` adds: task vectors to the model that they were made for."""

    task_vectors: Annotated[Several[File], Typed("FILE...", argument=True), Field(min_length=1)]
    """Task vectors; several are added."""
    model: Annotated[str, MODEL]
    """The pre-trained model: folder or hub id."""
    output: Annotated[File, FOLDER]
    """Where the edited model goes."""
    scale: Scale = 1.0
    """Factor of the task vectors; -1 negates."""
    dtype: DType | None = None
    """Default: that of each tensor of the model."""
    max_shard_size: ShardSize | None = None
    """Of one file, such as 5GB; default: the files of the model."""
    any_base: AnyBase = False


class ConvertConfig(Config):
    """What `tvjax.jobs.convert` writes: a model as another kind of checkpoint."""

    source: Annotated[str, Typed("MODEL", argument=True)]
    """Hugging Face, Orbax, MaxText or Tunix folder, hub id, or .pt file."""
    output: Annotated[File, FOLDER]
    """Where the model goes."""
    to: Literal["huggingface", "orbax", "maxtext", "tunix"] = "huggingface"
    """The kind of checkpoint."""
    dtype: DType | None = None
    """Default: that of the model."""
    max_shard_size: ShardSize = "5GB"
    """Of one safetensors file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    like: Annotated[str | None, MODEL] = None
    """For a .pt file, MaxText or Tunix: a model of the same shape, for its config."""
    allow_pickle: bool = False
    """Open a .pt file that you trust; needs torch."""
    scan_layers: bool = True
    """For MaxText: write the layers as one stack."""
    interleaved: bool | None = None
    """For MaxText: rotary pairs lie side by side. Default: as MaxText has them."""


class InspectConfig(Config):
    """What `tvjax.jobs.inspect` looks at: one thing, or two to compare."""

    things: Annotated[Several[str], Typed("THING [THING]", argument=True), Field(min_length=1)]
    """A model (folder or hub id), or a file of tvjax: a task vector, maps, coefficients. Two are compared."""
    compare: bool = False
    """Compare two things, as is done wherever two are given."""
    norms: bool | None = None
    """Norms by block; every tensor is read. Default: for task vectors."""
    sites: bool = False
    """Where the leaves of a model meet activations; no weights are read."""
    model: Annotated[str | None, MODEL] = None
    """The pre-trained model of a task vector, for relative norms."""
    plot: Annotated[File | None, FILE] = None
    """Also draw a heat map, kind of leaf by depth (.png)."""

    @model_validator(mode="after")
    def _fit_together(self) -> InspectConfig:
        if len(self.things) > 2:
            raise ValueError(f"{len(self.things)} things given, expected one, or two to compare")
        if self.compare and len(self.things) == 1:
            raise ValueError(f"--compare is for two things, found only {self.things[0]!r}: give another beside it")
        if len(self.things) == 2 and (self.sites or self.model is not None or self.norms is False):
            raise ValueError("--sites, --model and --no-norms are for one thing, found two")
        if self.norms is False and (self.plot is not None or self.model is not None):
            raise ValueError("--plot and --model need norms: leave --no-norms out")
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise ValueError(f"--plot is {str(self.plot)!r}, expected the name of a file in .png")
        return self
