"""Everything that a training run can be told, read from one TOML file. No torch.

A key that does not exist, a value of the wrong type or out of range is refused by name: a setting that is silently
ignored costs a whole run. Paths count from the current folder.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from lfm.errors import UsageError

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(ge=0)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a recipe."""


class RunSettings(Section, frozen=True, kw_only=True):
    """[run]: where and how long. Nothing here changes the weights that come out, except `seed` and `dtype`.

    `dtype` is what the model computes in; the optimizer's weights are always fp32. `minutes` 0: until the last step.
    """

    output: str
    seed: Count = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    minutes: Rate = 0.0
    save_every_steps: Positive = 500
    keep_checkpoints: Positive = 2
    checkpoint_activations: bool = False


class ShapeSettings(Section, frozen=True, kw_only=True):
    """[model.shape]: a new model, in the words of config.json. The vocabulary comes from the tokenizer."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    attention_layers: tuple[Count, ...]
    num_attention_heads: Positive
    num_key_value_heads: Positive
    num_dense_layers: Count
    moe_intermediate_size: Positive = 1
    num_experts: Positive = 1
    num_experts_per_tok: Positive = 1
    conv_L_cache: Positive = 3
    rope_theta: Annotated[float, Meta(gt=0)] = 1_000_000.0
    max_position_embeddings: Positive = 32_768
    init_std: Annotated[float, Meta(gt=0)] = 0.02


class ModelSettings(Section, frozen=True, kw_only=True):
    """[model]: either `start`, a model folder or the output folder of another run, or a `shape`."""

    start: str | None = None
    shape: ShapeSettings | None = None


class SyntheticSettings(Section, frozen=True, kw_only=True):
    """[data.synthetic]: conversations made by `lfm.train.synthetic`. Empty `languages`: all of them."""

    conversations: Positive
    seed: Count = 0
    shards: Positive = 16
    languages: tuple[str, ...] = ()


class DataSettings(Section, frozen=True, kw_only=True):
    """[data]: what is learnt. `files` are JSONL; `tokenizer` (a folder) is only needed where the model is new.

    Pretraining reads {"text": ...} or conversations, of which every token counts. SFT reads conversations, {"messages":
    [...], "tools": [...]} as in a chat request, of which only the assistant's turns count.
    """

    tokenizer: str | None = None
    files: tuple[str, ...] = ()
    synthetic: SyntheticSettings | None = None
    max_length: Annotated[int, Meta(ge=2)] = 2048
    validation_rows: Count = 0


class BatchSettings(Section, frozen=True, kw_only=True):
    """[batch]: a step's gradient is that of `accumulation` micro-batches of at most `tokens` tokens each."""

    tokens: Annotated[int, Meta(ge=2)]
    accumulation: Positive = 1


class OptimizerSettings(Section, frozen=True, kw_only=True):
    """[optimizer]: "muon" takes the hidden matrices with Muon and the rest with AdamW."""

    learning_rate: Annotated[float, Meta(gt=0)]
    name: Literal["adamw", "muon"] = "adamw"
    weight_decay: Rate = 0.1
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Annotated[float, Meta(gt=0)] = 1e-8
    momentum: Share = 0.95
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0


class ScheduleSettings(Section, frozen=True, kw_only=True):
    """[schedule]: linear warm-up, then a cosine down to `final_ratio` of the learning rate."""

    steps: Positive
    warmup_steps: Count = 0
    final_ratio: Share = 0.1


class LossSettings(Section, frozen=True, kw_only=True):
    """[loss]: weights of the two z-losses, and how fast the experts' selection biases move against their load."""

    router_z: Rate = 1e-3
    output_z: Rate = 1e-4
    balance_rate: Rate = 1e-3
    chunk_tokens: Positive = 4096


class DistillSettings(Section, frozen=True, kw_only=True):
    """[distill]: learn from another model too, by the decoupled top-K loss (`lfm.train.distill`).

    `teacher` is a model folder or hub id with the same tokenizer. The loss is (1 - weight) * next-token cross-entropy +
    weight * distillation.
    """

    teacher: str
    top_k: Positive = 32
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    weight: Share = 0.5


class TrainRecipe(Section, frozen=True, kw_only=True):
    """A recipe of `lfm train pretrain` or `lfm train sft`."""

    run: RunSettings
    model: ModelSettings
    data: DataSettings
    batch: BatchSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    loss: LossSettings = LossSettings()
    distill: DistillSettings | None = None


class TokenizerSettings(Section, frozen=True, kw_only=True):
    """[tokenizer]: `vocab_size` counts everything: special tokens, the 256 bytes and the merges."""

    output: str
    vocab_size: Annotated[int, Meta(ge=300, le=2**20)]
    min_frequency: Positive = 2


class TokenizerRecipe(Section, frozen=True, kw_only=True):
    """A recipe of `lfm train tokenizer`. [data] gives the text; its `tokenizer` and `max_length` have no meaning."""

    tokenizer: TokenizerSettings
    data: DataSettings


Recipe = TypeVar("Recipe", TrainRecipe, TokenizerRecipe)


def read_recipe(path: Path, kind: type[Recipe]) -> Recipe:
    """Read a TOML file. Raises UsageError naming the file and the first thing that is wrong with it."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no recipe {path}. Give the path of a TOML file; see docs/training.md.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}.") from error
    return parse_recipe(raw, kind, origin=str(path))


def parse_recipe(raw: Mapping[str, Any], kind: type[Recipe], *, origin: str) -> Recipe:
    """Check a decoded recipe. Raises UsageError; `origin` says where it came from."""
    _refuse_unknown(raw, kind, origin, "")
    try:
        recipe = msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{origin}: {error}.") from error
    if isinstance(recipe, TrainRecipe):
        _check_train(recipe, origin)
    _check_data(recipe.data, origin)
    return recipe


def _refuse_unknown(raw: Mapping[str, Any], kind: type[msgspec.Struct], origin: str, where: str) -> None:
    """Name an unknown key together with those that exist, which msgspec's own message does not."""
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in raw.items():
        if key not in known:
            raise UsageError(
                f"{origin}: {where}{key} is not known. Allowed: {', '.join(where + name for name in known)}."
            )
        section = _section_of(known[key])
        if section is not None and isinstance(value, Mapping):
            _refuse_unknown(value, section, origin, f"{where}{key}.")


def _section_of(annotation: Any) -> type[msgspec.Struct] | None:
    """The section that a field holds, if it holds one: `X` and `X | None` both do."""
    options = (annotation, *get_args(annotation))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def _check_train(recipe: TrainRecipe, origin: str) -> None:
    model, schedule = recipe.model, recipe.schedule
    if (model.start is None) == (model.shape is None):
        raise UsageError(f"{origin}: give either model.start or [model.shape], and not both.")
    if model.shape is not None and recipe.data.tokenizer is None:
        raise UsageError(f"{origin}: [model.shape] needs data.tokenizer, a folder that lfm train tokenizer made.")
    if schedule.warmup_steps >= schedule.steps:
        raise UsageError(
            f"{origin}: schedule.warmup_steps={schedule.warmup_steps} leaves none of schedule.steps={schedule.steps}."
        )
    if recipe.data.max_length - 1 > recipe.batch.tokens:
        raise UsageError(
            f"{origin}: data.max_length={recipe.data.max_length} does not fit into batch.tokens={recipe.batch.tokens}."
        )


def _check_data(data: DataSettings, origin: str) -> None:
    if not data.files and data.synthetic is None:
        raise UsageError(f"{origin}: [data] names nothing to learn from. Give data.files or [data.synthetic].")


def fingerprint(recipe: TrainRecipe, kind: str) -> dict[str, object]:
    """What a checkpoint has to agree with for training to go on from it: model, data, batches and optimizer."""
    raw: dict[str, Any] = msgspec.to_builtins(recipe)
    optimizer = raw["optimizer"]
    return {
        "kind": kind,
        "seed": raw["run"]["seed"],
        "dtype": raw["run"]["dtype"],
        "model": raw["model"],
        "data": raw["data"],
        "batch": raw["batch"],
        "optimizer": optimizer["name"],
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """The leaves in which two nested mappings differ, as "a.b was 1, is 2"."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        one, other = old.get(key), new.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{where}{key}.")
        elif _plain(one) != _plain(other):
            found.append(f"{where}{key} was {one!r}, is {other!r}")
    return found


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
