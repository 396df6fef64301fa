"""Loading and saving weights, with transformers and the safetensors package as oracles, and what broken folders get."""

import json
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM, Lfm2MoeConfig, Lfm2MoeForCausalLM

from lfm.config import ModelConfig
from lfm.errors import LfmError, MachineError, ModelError, UsageError
from lfm.model import weights
from lfm.model.checkpoint_files import INDEX_FILE, SINGLE_FILE
from lfm.model.lfm2 import Lfm2
from lfm.model.presets import PRESETS, fill_random
from lfm.model.weights import LoadReport, load_weights, save_weights

CPU = torch.device("cpu")
CONV, ATTENTION = "conv", "full_attention"
SMALL = replace(
    PRESETS["tiny"],
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    head_dim=8,
    dtype="float32",
)
BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "layer_types": [CONV, ATTENTION, CONV, ATTENTION], "num_hidden_layers": 4, "eos_token_id": 7,
}  # fmt: skip
MOE = BASE | {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "num_dense_layers": 1}
ORACLES: dict[str, Callable[[], torch.nn.Module]] = {
    "moe": lambda: Lfm2MoeForCausalLM(Lfm2MoeConfig(**MOE)),
    "moe, untied, conv bias": lambda: Lfm2MoeForCausalLM(
        Lfm2MoeConfig(**MOE, tie_word_embeddings=False, conv_bias=True, conv_L_cache=5)
    ),
    "moe, no expert bias": lambda: Lfm2MoeForCausalLM(Lfm2MoeConfig(**MOE, use_expert_bias=False)),
    "dense": lambda: Lfm2ForCausalLM(Lfm2Config(**BASE)),
    "dense, untied": lambda: Lfm2ForCausalLM(
        Lfm2Config(**BASE, tie_word_embeddings=False, block_auto_adjust_ff_dim=False, conv_bias=True)
    ),
}


def make_meta(config: ModelConfig) -> Lfm2:
    with torch.device("meta"):
        return Lfm2(config)


def make_random(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float32) -> Lfm2:
    model = make_meta(config)
    fill_random(model, device=CPU, dtype=dtype, seed=0)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.arange(buffer.numel()) / 7)
        assert "expert_bias" in name
    return model


def make_oracle(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = ORACLES[name]()
    for buffer_name, buffer in model.named_buffers():
        if "expert_bias" in buffer_name:
            buffer.copy_(torch.randn(buffer.shape))
    return model.to(dtype)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Lfm2:
    model = make_meta(ModelConfig.from_folder(folder))
    load_weights(model, folder, device=CPU, dtype=dtype)
    return model


def save(folder: Path, config: ModelConfig = SMALL, max_shard_bytes: int = 10**9) -> Lfm2:
    model = make_random(config)
    save_weights(model, folder, max_shard_bytes=max_shard_bytes)
    return model


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def oracle_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters of a transformers model under our names, which are its own in memory."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], file: str = SINGLE_FILE) -> None:
    """Change the tensors of a saved checkpoint in place, with the safetensors package."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    save_file(change(tensors), folder / file, metadata={"format": "pt"})


def error_of(folder: Path) -> str:
    """What loading the folder says: one line. The model must still be as it was."""
    model = make_meta(SMALL)
    with pytest.raises(LfmError) as caught:
        load_weights(model, folder, device=CPU, dtype=torch.float32)
    assert isinstance(caught.value, ModelError)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("name", ORACLES)
def test_checkpoint_of_transformers_loads_with_the_same_tensors(name: str, max_shard_size: str, tmp_path: Path) -> None:
    oracle = make_oracle(name)
    oracle.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX_FILE).exists() == (max_shard_size == "40KB")
    assert_same_tensors(load(tmp_path).state_dict(), oracle_state(oracle))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000, 1])
@pytest.mark.parametrize("name", ORACLES)
def test_checkpoint_of_ours_loads_in_transformers_with_nothing_missing(
    name: str, max_shard_bytes: int, tmp_path: Path
) -> None:
    make_oracle(name).save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source")
    save_weights(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    oracle, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_same_tensors(model.state_dict(), oracle_state(oracle))
    assert_same_tensors(model.state_dict(), load(tmp_path / "saved").state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_converted_on_the_way(dtype: torch.dtype, target: torch.dtype, tmp_path: Path) -> None:
    oracle = make_oracle("moe", dtype)
    oracle.save_pretrained(tmp_path)
    stored = load_file(tmp_path / SINGLE_FILE)
    loaded = load(tmp_path, target).state_dict()
    for name, tensor in oracle_state(oracle).items():
        is_bias = name.endswith("expert_bias")
        expected = stored[name] if is_bias else tensor
        assert torch.equal(loaded[name], expected.to(torch.float32 if is_bias else target)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_dtype_is_the_models_and_biases_stay_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_random(dtype=dtype)
    save_weights(model, tmp_path)
    assert ModelConfig.from_folder(tmp_path) == replace(SMALL, dtype=str(dtype).removeprefix("torch."))
    for name, tensor in load_file(tmp_path / SINGLE_FILE).items():
        assert tensor.dtype == (torch.float32 if name.endswith("expert_bias") else dtype), name
    assert_same_tensors(load(tmp_path, dtype).state_dict(), model.state_dict())


def test_small_staging_buffers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor in pieces of 48 bytes: no element is lost or moved at a piece's end."""
    model = save(tmp_path)
    monkeypatch.setattr(weights, "_STAGING_BYTES", 48)
    assert_same_tensors(
        load(tmp_path, torch.float64).float().state_dict(), {n: t.float() for n, t in model.state_dict().items()}
    )


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_fused_experts_load(suffix: str, tmp_path: Path) -> None:
    model = save(tmp_path)
    fused = {name + suffix if ".experts." in name else name: tensor for name, tensor in model.state_dict().items()}
    rewrite(tmp_path, lambda _: fused)
    assert_same_tensors(load(tmp_path).state_dict(), model.state_dict())


def test_layers_may_differ_in_their_expert_layout(tmp_path: Path) -> None:
    model = save(tmp_path)
    prefix = "model.layers.3.feed_forward.experts."
    fused = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    rewrite(tmp_path, lambda all_: {n: t for n, t in all_.items() if not n.startswith(prefix)} | fused)
    assert_same_tensors(load(tmp_path).state_dict(), model.state_dict())


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    model = save(tmp_path)
    rewrite(tmp_path, lambda all_: all_ | {"lm_head.weight": all_["model.embed_tokens.weight"].clone()})
    assert_same_tensors(load(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("change", [lambda t: t + 1e-3, lambda t: t.bfloat16(), lambda t: t[:-1].clone()])
def test_a_tied_head_that_differs_is_refused(change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path, lambda all_: all_ | {"lm_head.weight": change(all_["model.embed_tokens.weight"])})
    assert "lm_head.weight that differs" in error_of(tmp_path)


def test_missing_unexpected_misshapen_and_unreadable_tensors_are_listed_together(tmp_path: Path) -> None:
    save(tmp_path)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors["model.layers.2.feed_forward.experts.5.w2.weight"]
        del tensors["model.embedding_norm.weight"]
        tensors["model.layers.0.mystery.weight"] = torch.zeros(1)
        tensors["model.layers.2.feed_forward.gate.weight"] = torch.zeros(8, 31)
        tensors["model.layers.2.feed_forward.expert_bias"] = torch.zeros(8, dtype=torch.int32)
        return tensors

    rewrite(tmp_path, change)
    text = error_of(tmp_path)
    assert str(tmp_path) in text
    assert "2 missing: " in text
    assert "model.layers.2.feed_forward.experts.5.w2.weight" in text
    assert "model.embedding_norm.weight" in text
    assert "1 unexpected: model.layers.0.mystery.weight" in text
    assert "1 of the wrong shape: model.layers.2.feed_forward.gate.weight (8, 31) instead of (8, 32)" in text
    assert "1 of a dtype that cannot be read: model.layers.2.feed_forward.expert_bias I32" in text


def test_a_long_list_is_cut_after_20_and_counts_the_rest(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path, lambda all_: {n: t for n, t in all_.items() if ".experts." not in n})
    text = error_of(tmp_path)
    assert "144 missing: " in text
    assert "and 124 more" in text
    assert text.count(".experts.") == 20


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused_by_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path, lambda all_: {n: t.to(dtype) if t.dim() == 2 else t for n, t in all_.items()})
    assert "of a dtype that cannot be read" in error_of(tmp_path)


def test_both_expert_layouts_at_once_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path)
    name = "model.layers.2.feed_forward.experts.down_proj"
    rewrite(tmp_path, lambda all_: all_ | {name: model.state_dict()[name].clone()})
    assert f"1 unexpected: {name}" in error_of(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=100_000)
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert f"lacks 1 of the 7 weight files that {INDEX_FILE} names: {victim.name}" in error_of(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "model.bin",
        3,
        None,
        ["x"],
        "a\0.safetensors",
    ],
)
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(name: object, tmp_path: Path) -> None:
    save(tmp_path / "model")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "model" / SINGLE_FILE).read_bytes())
    (tmp_path / "model" / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": name}}))
    assert INDEX_FILE in error_of(tmp_path / "model")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\udcff"])
def test_an_index_that_is_no_index_is_refused(text: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / INDEX_FILE).write_bytes(text.encode(errors="surrogateescape"))
    assert INDEX_FILE in error_of(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=100_000)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    rewrite(tmp_path, lambda all_: all_ | {name: torch.zeros(3)}, second.name)
    assert f"repeats '{name}' of {first.name}" in error_of(tmp_path)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def tensor_info(**change: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "seven bytes": b"1234567",
        "header longer than the file": struct.pack("<Q", 1000) + b"{}",
        "header of 2**64 - 1": b"\xff" * 8 + b"{}",
        "header of no bytes": struct.pack("<Q", 0),
        "zip": b"PK\x03\x04" + b"\0" * 100,
        "no JSON": with_header(b"{not json"),
        "deep JSON": with_header(b"[" * 200_000),
        "a list": with_header([]),
        "no UTF-8": with_header(b'{"\xff": 1}'),
        "no offsets": with_header({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        "not a dict": with_header({"x": 3}, bytes(8)),
        "negative size": with_header(tensor_info(shape=[-2]), bytes(8)),
        "fractional size": with_header(tensor_info(shape=[2.0]), bytes(8)),
        "end before start": with_header(tensor_info(data_offsets=[8, 0]), bytes(8)),
        "bytes unlike shape": with_header(tensor_info(shape=[3]), bytes(8)),
        "huge shape": with_header(tensor_info(shape=[2**62, 2**62]), bytes(8)),
        "data cut off": with_header(tensor_info(), bytes(7)),
        "data too long": with_header(tensor_info(), bytes(9)),
        "hole": with_header(tensor_info(data_offsets=[4, 12]), bytes(12)),
        "overlap": with_header({**tensor_info(), "y": tensor_info(data_offsets=[4, 12])["x"]}, bytes(12)),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_broken_weight_file_is_named_with_its_fix(content: tuple[str, bytes], tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content[1])
    text = error_of(tmp_path)
    assert SINGLE_FILE in text
    assert "Download the model again" in text


def test_a_truncated_checkpoint_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert "is not a whole safetensors file" in error_of(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "git lfs pull" in error_of(tmp_path)


def test_a_folder_with_pickles_only_is_refused_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "only as pickles (pytorch_model.bin)" in error_of(tmp_path)


def test_a_folder_without_weights_says_what_is_needed(tmp_path: Path) -> None:
    assert "has no model.safetensors" in error_of(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert f"neither {SINGLE_FILE} nor {INDEX_FILE}" in error_of(tmp_path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    path = tmp_path / SINGLE_FILE
    allocate = weights.allocate

    def allocate_and_cut(*args: Any, **kwargs: Any) -> Tensor:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        return allocate(*args, **kwargs)

    monkeypatch.setattr(weights, "allocate", allocate_and_cut)
    with pytest.raises(ModelError, match="became shorter"):
        load(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_a_device_without_memory_is_a_machine_error() -> None:
    model = make_meta(replace(SMALL, vocab_size=2**45))
    with pytest.raises(MachineError, match=r"no memory left for model\.embed_tokens\.weight"):
        fill_random(model, device=CPU, dtype=torch.float64, seed=0)


def test_report_and_progress_count_the_bytes_of_the_files(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=100_000)
    lines: list[str] = []
    model = make_meta(SMALL)
    report = load_weights(model, tmp_path, device=CPU, dtype=torch.bfloat16, on_progress=lines.append)
    total = json.loads((tmp_path / INDEX_FILE).read_text())["metadata"]["total_size"]
    assert report == LoadReport(bytes=total, seconds=report.seconds, num_tensors=len(load_all(tmp_path)))
    assert report.seconds > 0
    assert lines[-1].startswith("loading weights [####################] 621.2 kB of 621.2 kB, ")
    assert lines[-1].endswith("/s")


def memory_bytes(field: str) -> int:
    """A figure of /proc/self/status: VmRSS is the memory held now, VmHWM the most since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_loading_takes_no_more_memory_than_the_model_and_its_staging_buffers(
    target: torch.dtype, tmp_path: Path
) -> None:
    """A reader that holds a file at a time would need 154 MB more.

    The weight of the model lies in two tensors that are too large for the heap, so what is freed leaves the process.
    """
    config = replace(SMALL, vocab_size=300_000, hidden_size=64, tie_word_embeddings=False)
    save_weights(make_random(config), tmp_path, max_shard_bytes=10**9)
    reset = Path("/proc/self/clear_refs")
    if not (reset.exists() and os.access(reset, os.W_OK)):
        pytest.skip("needs /proc/self/clear_refs, to measure the peak of one load")
    model = make_meta(config)
    before = memory_bytes("VmRSS")
    reset.write_text("5")
    report = load_weights(model, tmp_path, device=CPU, dtype=target)
    growth = memory_bytes("VmHWM") - before
    model_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert report.bytes > 140_000_000
    staging_bytes = 0 if target == torch.float32 else weights._NUM_READERS * weights._STAGING_BYTES
    assert 0.9 * model_bytes < growth < model_bytes + staging_bytes + 32_000_000


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def test_the_index_names_the_shard_of_every_tensor(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert [path.name for path in shards] == [f"model-{i:05d}-of-00007.safetensors" for i in range(1, 8)]
    for path in shards:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            assert {name for name, shard in index["weight_map"].items() if shard == path.name} == names
            assert sum(file.get_tensor(name).nbytes for name in names) <= 100_000


def test_saving_over_other_weights_is_refused(tmp_path: Path) -> None:
    save(tmp_path, max_shard_bytes=100_000)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match="already holds weights"):
        save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_while_saving_leaves_no_half_file(tmp_path: Path) -> None:
    """/dev/full answers every write with the error of a full disk."""
    (tmp_path / f"{SINGLE_FILE}.partial").symlink_to("/dev/full")
    with pytest.raises(MachineError, match=r"disk is full: .* needs 621\.2 kB"):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_training_flags_of_parameters_are_kept(tmp_path: Path) -> None:
    save(tmp_path)
    model = make_meta(SMALL)
    model.model.embed_tokens.weight.requires_grad_(False)
    load_weights(model, tmp_path, device=CPU, dtype=torch.float32)
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.model.embedding_norm.weight.requires_grad
    assert "model.layers.2.feed_forward.expert_bias" in dict(model.named_buffers())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_on_the_gpu(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = save(tmp_path).state_dict()
    monkeypatch.setattr(weights, "_STAGING_BYTES", 4096)
    model = make_meta(SMALL)
    load_weights(model, tmp_path, device=torch.device("cuda"), dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), expected[name].to(tensor.dtype)), name
