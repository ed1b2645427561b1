"""Dense against skipped at the sizes of 7B models on a CUDA GPU, beside what the GPU can do and beside transformers.

    python -m benchmarks.gpu_speed [--models llama-7b llama-3-8b] [--settings 0 1 2 3] [--batches 1 32] [--rounds N]
                                   [--compiled] [--result FILE]

Weights are random, in bf16: times depend on sizes alone. In every round the dense model, the skipped one and
transformers' Llama run once, on the same weights; the first rounds do not count. Prefill and one decoded token, at the
length of the prompt, are ours as captured CUDA graphs, so that no launch waits for Python; decoding also goes through
torch.compile where that is asked for, which takes its time. transformers runs as its `generate` does. A stage is also
given as a multiple of its roofline: the longer of its FLOPs at the rate of a matrix product, and of its bytes at the
rate of a copy, both measured in this run.

Results are written after every case, and join those of the same day and GPU in FILE, so that a run may be cut into
several. A stage that fails says why. Needs torch with CUDA; without transformers its columns are left out, aloud.
Exit code 3 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from benchmarks.gpu_check import NO_DEVICE, Timer, between_events, cuda_timer
from benchmarks.measuring import RESULTS, ratio, spread, surroundings, write_results
from skipvision.config import ModelConfig, SkipConfig, TextConfig, VisionConfig
from skipvision.cost import decode_flops, decoder_flops, encoder_flops, head_flops, kv_bytes, projector_flops
from skipvision.decoder import KVCache
from skipvision.layout import BatchLayout, ImageSpan, TokenLayout
from skipvision.model import BatchTensors, SkipVisionModel
from svcli_engines.torch_steps import compile_step, reason

RESULT = RESULTS / "gpu_speed.json"
Stage = Literal["vision", "prefill", "decode_token"]
STAGES: tuple[Stage, ...] = ("vision", "prefill", "decode_token")
TEXT = {
    "llama-7b": TextConfig(32000, 4096, 11008, 32, 32, 32, 128, tie_embeddings=False),
    "llama-3-8b": TextConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5, tie_embeddings=False),
}
# CLIP's ViT-L/14, read at its last layer but one, as LLaVA does.
VISION = VisionConfig(336, 14, 1024, 4096, 24, 16, feature_layers=(23,), select_layer=23)
_BEFORE, _BEHIND = 8, 32
"""Text rows around the picture: 40, as the paper's FLOPs are counted."""
_WARM_UP = 3
_COPY_BYTES, _MATMUL_WIDTH = 2**30, 8192


@dataclass(frozen=True)
class Setting:
    """How a picture is seen, in tokens an image."""

    num_images: int
    image_size: int
    num_retained: int
    num_skipped: int


SETTINGS = {
    "LLaVA, 100 + 156 of 576": Setting(1, 336, 100, 156),
    "LLaVA, 256 + 320 of 576": Setting(1, 336, 256, 320),
    "CoS, 272 + 256 of 1,296": Setting(1, 504, 272, 256),
    # The paper retains the thumbnail's 576 and merges the rest to 576; here each of the five tiles keeps its share.
    "LLaVA-HD, 575 + 575 of 2,880": Setting(5, 336, 115, 115),
}


@dataclass(frozen=True)
class Variant:
    """One model with a prompt for it."""

    model: SkipVisionModel
    layout: TokenLayout

    def flops(self, stage: Stage, batch_size: int) -> int:
        """Of the matrix products of a stage."""
        config = self.model.config
        if stage == "vision":
            image = encoder_flops(config.vision) + projector_flops(config)
            return batch_size * len(self.layout.images) * image
        if stage == "prefill":
            return batch_size * (decoder_flops(config.text, self.layout) + head_flops(config.text))
        return batch_size * decode_flops(config.text, self.layout.num_kept)

    def bytes(self, stage: Stage, batch_size: int) -> int:
        """Read once by a stage: the weights, and the KV cache when decoding."""
        if stage == "vision":
            return _bytes(self.model.vision) + _bytes(self.model.projector)
        decoder = self.model.decoder
        weights = sum(map(_bytes, (decoder.layers, decoder.norm, decoder.head)))
        return weights + (self.cached(batch_size) if stage == "decode_token" else 0)

    def cached(self, batch_size: int) -> int:
        """Bytes of the KV cache after prefill."""
        itemsize = self.model.decoder.embed.weight.itemsize
        return batch_size * kv_bytes(self.model.config.text, self.layout.num_kept, itemsize)


def _bytes(module: nn.Module) -> int:
    return sum(each.numel() * each.itemsize for each in module.parameters())


def variants(text: TextConfig, vision: VisionConfig, setting: Setting, device: str) -> dict[str, Variant]:
    """`dense` and `skipped`, in bf16, with the same random weights."""
    config = ModelConfig(
        replace(vision, image_size=setting.image_size),
        text,
        SkipConfig(setting.num_retained, setting.num_skipped),
        projector_size=text.hidden_size,
        projector_norm=False,
        projector_position=False,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # in fp32 it would take twice the memory, for a moment
    try:
        with torch.device(device):
            skipped = SkipVisionModel(config)
    finally:
        torch.set_default_dtype(default)
    models = {"dense": skipped.with_skip(None), "skipped": skipped}
    return {name: Variant(model.eval(), _layout(model.config, setting)) for name, model in models.items()}


def _layout(config: ModelConfig, setting: Setting) -> TokenLayout:
    return TokenLayout((_BEFORE, *[ImageSpan.of(config)] * setting.num_images, _BEHIND))


class Clock(Protocol):
    """Makes timers."""

    def eager(self, run: Callable[[], object]) -> Timer:
        """Of what Python starts anew each time."""

    def captured(self, run: Callable[[], None]) -> Timer:
        """Of what is captured once and replayed."""


class CudaClock:
    """By CUDA events, so that waiting for Python counts where the GPU has to."""

    def eager(self, run: Callable[[], object]) -> Timer:
        def seconds() -> float:
            torch.cuda.synchronize()
            return between_events(run)

        return seconds

    def captured(self, run: Callable[[], None]) -> Timer:
        return cuda_timer(run)


@dataclass(frozen=True)
class Roofline:
    """What the device does at best, measured."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: int, num_bytes: int) -> float:
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)


def roofline(
    clock: Clock, device: str, rounds: int, copy_bytes: int = _COPY_BYTES, width: int = _MATMUL_WIDTH
) -> Roofline:
    """A copy reads and writes; a matrix product is square, in bf16."""
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    timers = clock.eager(lambda: target.copy_(source)), clock.eager(lambda: left @ right)
    copy, matmul = (spread([timer() for _ in range(_WARM_UP + rounds)][_WARM_UP:])["median"] for timer in timers)
    return Roofline(2 * width**3 / matmul, 2 * copy_bytes / copy)


class Peer:
    """transformers' Llama on the weights of a decoder of ours, which it shares."""

    def __init__(self, dense: SkipVisionModel, device: str) -> None:
        llama: Any = import_module("transformers.models.llama.modeling_llama")
        text = dense.config.text
        config = llama.LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            num_key_value_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=text.rope_theta,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            self.model: Any = llama.LlamaForCausalLM(config)
        self.model.load_state_dict(dict(llama_weights(dense)), assign=True)
        with torch.device(device):
            self.model.model.rotary_emb = llama.LlamaRotaryEmbedding(config=config)  # holds no weights
        self.model.eval()

    def prefill(self, rows: Tensor) -> Any:
        """Logits [B, 1, vocab] of the last of embedded `rows` [B, L, D], and the cache."""
        with torch.no_grad():
            return self.model(inputs_embeds=rows, use_cache=True, logits_to_keep=1)

    def decode(self, ids: Tensor, cache: Any) -> Any:
        """Logits [B, 1, vocab] of ids [B, 1]; the cache is as long as before."""
        with torch.no_grad():
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        cache.crop(-ids.shape[1])
        return logits


def llama_weights(model: SkipVisionModel) -> Iterator[tuple[str, Tensor]]:
    """The decoder's weights under the names of transformers."""
    attention = {f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"}
    ffn = {f"ffn.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    inside = attention | ffn | {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    outside = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for name, tensor in model.decoder.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in outside:
            yield f"{outside[stem]}.weight", tensor
        else:
            _, layer, part = stem.split(".", 2)
            yield f"model.layers.{layer}.{inside[part]}.weight", tensor


@dataclass(frozen=True)
class Bench:
    """All that is timed for one model, one setting and one number of rows."""

    variants: Mapping[str, Variant]
    peer: Peer | None
    batch_size: int
    device: str
    clock: Clock
    compiled: bool
    """Whether our decode step goes through torch.compile."""

    def timers(self, stage: Stage) -> dict[str, Timer]:
        """One for each variant; transformers has no vision stage of its own here."""
        made = {name: self._timer(stage, variant) for name, variant in self.variants.items()}
        if self.peer is not None and stage != "vision":
            made["transformers"] = self._peer_timer(stage, self.peer)
        return made

    def _timer(self, stage: Stage, variant: Variant) -> Timer:
        model, images = variant.model, len(variant.layout.images) * self.batch_size
        if stage == "vision":
            size = model.config.vision.image_size
            pixels = torch.randn(images, 3, size, size, dtype=torch.bfloat16, device=self.device)

            def encode() -> None:
                with torch.no_grad():
                    model.encode_images(pixels)

            return self.clock.eager(encode)
        shape = images, model.span.length, model.config.text.hidden_size
        visual = torch.randn(shape, dtype=torch.bfloat16, device=self.device)
        ids = torch.zeros(self.batch_size, variant.layout.num_ids, dtype=torch.long, device=self.device)
        batch = BatchLayout.of([variant.layout] * self.batch_size, variant.layout.num_ids)
        if stage == "prefill":
            return self.clock.captured(prefill_step(model, ids, visual, batch))
        _, cache = model.prefill(ids, visual, batch, batch.num_kept + 1)
        step = decode_step(model, cache, ids[:, :1])
        return self.clock.captured(compile_step(step) if self.compiled else step)

    def _peer_timer(self, stage: Stage, peer: Peer) -> Timer:
        dense = self.variants["dense"]
        shape = self.batch_size, dense.layout.length, dense.model.config.text.hidden_size
        rows = torch.randn(shape, dtype=torch.bfloat16, device=self.device)
        if stage == "prefill":
            return self.clock.eager(lambda: peer.prefill(rows))
        cache = peer.prefill(rows).past_key_values
        ids = torch.zeros(self.batch_size, 1, dtype=torch.long, device=self.device)
        return self.clock.eager(lambda: peer.decode(ids, cache))

    def measure(self, stage: Stage, rounds: int, limit: Roofline) -> dict[str, Any]:
        """Spread of each variant's seconds, ratios, and multiples of the roofline."""
        timers = self.timers(stage)
        times: dict[str, list[float]] = {name: [] for name in timers}
        order = list(timers)
        for number in range(_WARM_UP + rounds):
            for name in order if number % 2 else reversed(order):
                took = timers[name]()
                if number >= _WARM_UP:
                    times[name].append(took)
        flops = {name: variant.flops(stage, self.batch_size) for name, variant in self.variants.items()}
        least = {
            name: limit.seconds(flops[name], variant.bytes(stage, self.batch_size))
            for name, variant in self.variants.items()
        }
        seconds = {name: spread(values) for name, values in times.items()}
        found = {
            "seconds": seconds,
            "ratio": ratio(times["skipped"], times["dense"]),
            "flops_ratio": flops["skipped"] / flops["dense"],
            "times_roofline": {name: seconds[name]["median"] / least[name] for name in least},
        }
        if "transformers" in times:
            found["ratio_to_transformers"] = ratio(times["skipped"], times["transformers"])
        return found


def prefill_step(model: SkipVisionModel, ids: Tensor, visual: Tensor, batch: BatchLayout) -> Callable[[], None]:
    """Prefill of the same prompt into the same cache, every time; logits stay where they are."""
    cache, tensors = model.new_cache(len(ids), batch.num_kept), BatchTensors.of(batch, ids.device)
    logits = torch.empty(len(ids), model.config.text.vocab_size, dtype=visual.dtype, device=ids.device)

    def step() -> None:
        with torch.no_grad():
            logits.copy_(model.fill(ids, visual, tensors, cache))

    return step


def decode_step(model: SkipVisionModel, cache: KVCache, ids: Tensor) -> Callable[[], None]:
    """A step that writes the slot behind the prompt, every time the same one: logits stay where they are."""
    logits = torch.empty(len(ids), model.config.text.vocab_size, dtype=cache.keys[0].dtype, device=ids.device)

    def step() -> None:
        with torch.no_grad():
            same_place = KVCache(cache.keys, cache.values, cache.lengths.clone(), cache.next_positions.clone())
            decoder = model.decoder
            logits.copy_(decoder.logits(decoder.extend(decoder.embed(ids), same_place))[:, -1])

    return step


def measured(bench: Bench, rounds: int, limit: Roofline) -> dict[str, Any]:
    """All stages of one case. Where memory is too small for a stage, it is measured without transformers."""
    found: dict[str, Any] = {
        "rows": {name: variant.layout.length for name, variant in bench.variants.items()},
        "kv_bytes": {name: variant.cached(bench.batch_size) for name, variant in bench.variants.items()},
    }
    for stage in STAGES:
        found[stage] = _stage(bench, stage, rounds, limit)
        if "out_of_memory" in found[stage] and bench.peer is not None:
            found[stage] = _stage(replace(bench, peer=None), stage, rounds, limit)
    return found


def _stage(bench: Bench, stage: Stage, rounds: int, limit: Roofline) -> dict[str, Any]:
    """Figures, or why there are none: a GPU is seldom at hand, and one stage shall not cost the others."""
    try:
        return bench.measure(stage, rounds, limit)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": reason(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {reason(error)}"}
    finally:
        torch.compiler.reset()  # or else its limit of recompilations is met: every case has a step of its own
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def joined(cases: list[dict[str, Any]], results: dict[str, Any], path: Path) -> dict[str, Any]:
    """`results` with `cases`, and with those that the file has from the same day, GPU and versions."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    same = all(before.get(name) == results[name] for name in ("date", "gpu", "versions", "transformers"))
    measured_now = {_key(case) for case in cases}
    kept = [case for case in before.get("cases", []) if _key(case) not in measured_now] if same else []
    return results | {"cases": kept + cases}


def _key(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return case["model"], case["setting"], case["batch"], case["compiled"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TEXT, default=list(TEXT))
    parser.add_argument("--settings", nargs="+", type=int, choices=range(len(SETTINGS)), default=range(len(SETTINGS)))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=20, help="of a single sequence; a quarter of it for more")
    parser.add_argument("--compiled", action="store_true", help="decode through torch.compile, too")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.rounds < 1 or min(options.batches) < 1:
        parser.error("--rounds and --batches are 1 or more")
    if not torch.cuda.is_available():
        print("no CUDA device that torch can use: these sizes need an NVIDIA GPU and torch with CUDA", file=sys.stderr)
        raise SystemExit(NO_DEVICE)
    results = surroundings(torch.get_num_threads()) | {"gpu": torch.cuda.get_device_name(), "rounds": options.rounds}
    results["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    clock, device = CudaClock(), "cuda"
    limit = roofline(clock, device, options.rounds)
    results |= {"matmul_flops_per_second": limit.flops_per_second, "copy_bytes_per_second": limit.bytes_per_second}
    results["transformers"] = _installed("transformers")
    if results["transformers"] is None:
        print("transformers is not installed: there will be nothing beside our own figures", file=sys.stderr)
    settings = [list(SETTINGS.items())[number] for number in options.settings]
    cases: list[dict[str, Any]] = []
    for model, (name, setting) in product(options.models, settings):
        try:
            made = variants(TEXT[model], VISION, setting, device)
            peer = None if results["transformers"] is None else Peer(made["dense"].model, device)
        except torch.OutOfMemoryError as error:
            print(f"{model} does not fit this GPU: {reason(error)}", file=sys.stderr)
            break
        for batch_size in options.batches:
            bench = Bench(made, peer, batch_size, device, clock, options.compiled)
            rounds = options.rounds if batch_size == 1 else max(1, options.rounds // 4)
            case = {"model": model, "setting": name, "batch": batch_size, "compiled": options.compiled}
            cases.append(case | measured(bench, rounds, limit))
            print(cases[-1], flush=True)
            write_results(joined(cases, results, options.result), options.result)
        del made, peer, bench
        gc.collect()
        torch.cuda.empty_cache()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
