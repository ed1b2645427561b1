"""Other run times get the same weights, and are held against ours in turns."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skipvision.config import ResamplerConfig, TextConfig, TilesConfig
from skipvision.layout import TokenLayout
from svcli.bench import peers
from svcli.bench.contestants import Asked, drawn_picture, sides
from svcli.bench.picture_peer import misfit, pruning_ratio
from svcli.bench.report import FailedPeer, Peer
from svcli.bench.text_engines import Worker, WorkerError, last_words
from svcli.bench.text_models import decoder_config, decoder_name, write_decoder
from svcli.engines import EngineName
from svcli.errors import UsageError
from svcli.settings import bundled_model
from svcli_engines.base import MachineError
from svcli_engines.torch_engine import TorchEngine
from svcli_export.manifest import load_manifest
from svcli_export.pixels import to_square
from tests.optional import missing
from tests.skipvision.zoo import transformers

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -1].numpy()


def test_the_decoder_that_is_handed_over_is_ours(tmp_path: Path) -> None:
    bundle = bundled_model()
    manifest = load_manifest(bundle)
    write_decoder(bundle, manifest, tmp_path / "decoder")
    theirs = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    ours = TorchEngine.of_bundle(bundle, manifest).prefill(IDS, None, TokenLayout((len(IDS),)))
    # Both in fp32 on the same numbers; sums in another order.
    np.testing.assert_allclose(logits(theirs), ours, atol=2e-4)
    assert json.loads((tmp_path / "decoder" / "tokenizer.json").read_text())


def test_biases_and_heads_that_are_not_tied_have_names_too() -> None:
    assert decoder_config(TextConfig(qkv_bias=True), 8, (1, 2))["architectures"] == ["Qwen2ForCausalLM"]
    assert decoder_name("decoder.layers.11.attention.q.bias") == "model.layers.11.self_attn.q_proj.bias"
    assert decoder_name("decoder.head.weight") == "lm_head.weight"
    with pytest.raises(AssertionError, match=r"decoder\.surprise"):
        decoder_name("decoder.surprise")


def test_a_peer_that_is_not_there_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _name: None)
    said = r'--peer onnxruntime-genai: not installed here: pip install onnxruntime-genai "svcli\[torch\]" transformers'
    with pytest.raises(MachineError, match=said):
        peers.check_peers(["onnxruntime-genai"], EngineName.ONNXRUNTIME)
    with pytest.raises(MachineError, match=r'pip install transformers "svcli\[torch\]"$'):
        peers.check_peers(["transformers"], EngineName.ONNXRUNTIME)


def test_peers_that_are_not_known_or_not_comparable_are_refused() -> None:
    with pytest.raises(UsageError, match="choose among transformers, onnxruntime-genai"):
        peers.check_peers(["fastest"], EngineName.ONNXRUNTIME)
    with pytest.raises(UsageError, match="against --engine onnxruntime alone"):
        peers.check_peers(["transformers"], EngineName.TORCH)
    peers.check_peers([], EngineName.TORCH)


def test_text_that_our_own_cache_has_no_room_for_is_refused_first() -> None:
    (graphs, _) = sides(bundled_model(), EngineName.ONNXRUNTIME)
    side = graphs.open(Asked("What?", (drawn_picture(),), ("drawn",)))
    room = side.engine.capacity - side.prompt.layout.length
    peers.check_peers_room(["transformers"], side, room)
    peers.check_peers_room([], side, room + 1)
    with pytest.raises(UsageError, match=f"--peer: the dense KV cache has no room for {room + 1} tokens behind"):
        peers.check_peers_room(["transformers"], side, room + 1)
    side.close()


def test_one_that_prunes_is_asked_about_one_whole_picture_alone() -> None:
    config = load_manifest(bundled_model()).config
    assert misfit(config, 1) is None
    assert "about one" in str(misfit(config, 0))
    assert "about one" in str(misfit(config, 2))
    plain = replace(config, skip=None, projector_convs=0, projector_position=False)
    assert "are cut" in str(misfit(replace(plain, tiles=TilesConfig(longest_edge=448)), 1))
    resampled = replace(
        plain, projector="resampler", projector_norm=False, resampler=ResamplerConfig((16, 4), (4, 4), 6)
    )
    assert "resampler" in str(misfit(resampled, 1))


def test_why_no_picture_was_asked_is_said_of_those_that_could_see_one() -> None:
    bundle = bundled_model()
    (graphs, _) = sides(bundle, EngineName.ONNXRUNTIME)
    side = graphs.open(Asked("What?", (drawn_picture(),), ("drawn",)))
    try:
        assert peers.unseen(list(peers.PEERS), side) == []
        side.asked = Asked("What?", (), ())
        (said,) = peers.unseen(list(peers.PEERS), side)
        assert said == "openvino-genai was asked about text alone: of pictures, it is asked about one"
    finally:
        side.close()


@pytest.mark.parametrize(("tokens", "kept", "percent"), [(256, 98, 62), (256, 256, 0), (576, 1, 99), (100, 37, 63)])
def test_as_many_are_pruned_as_leave_what_ours_keeps(tokens: int, kept: int, percent: int) -> None:
    assert pruning_ratio(tokens, kept) == percent


def test_ours_is_timed_from_a_picture_that_was_made_a_square_before() -> None:
    (graphs, _) = sides(bundled_model(), EngineName.ONNXRUNTIME)
    side = graphs.open(Asked("What?", (drawn_picture(),), ("drawn",)))
    try:
        (image,) = side.images()
        square = to_square(image, side.manifest.image)
        assert square.size == (224, 224)
        np.testing.assert_array_equal(side.processor.views(square), side.processor.views(image))
        side.asked = Asked("What?", (b"not read again",), ("broken",))
        found = side.answer(2, images=[square])
        assert 0 < found["first_token"] < found["end_to_end"]
    finally:
        side.close()


def test_a_worker_says_what_the_engine_says_and_of_variants_too() -> None:
    bundle = bundled_model()
    said = []
    for model in (bundle, f"{bundle}:dense"):
        with Worker("ours", model, 1, 64) as worker:
            answer = worker.ask(IDS, 4)
            assert len(answer["decode"]) == 3
            said.append(answer["tokens"])
            assert worker.ask(IDS, 4)["tokens"] == answer["tokens"]
    # Without pictures nothing is skipped.
    assert said[0] == said[1]


def test_a_worker_that_ends_leaves_its_last_words(tmp_path: Path) -> None:
    with (
        Worker("ours", tmp_path / "missing", 1, 64) as worker,
        pytest.raises(WorkerError, match=r"ours ended: .*missing"),
    ):
        worker.ask(IDS, 2)


def test_a_process_that_was_killed_says_so() -> None:
    with Worker("ours", bundled_model(), 1, 64) as worker:
        assert len(worker.ask(IDS, 2)["tokens"]) == 2
        worker._process.kill()
        with pytest.raises(WorkerError, match="ours ended: killed, as the kernel does where memory runs out"):
            worker.ask(IDS, 2)
    assert last_words("Warning: slow\nbad_alloc\n", -6) == "Aborted, behind: bad_alloc"
    assert last_words("", 7) == "exit code 7, without a word"


PEER = """
import json, os, sys
from svcli.bench.text_engines import answers_alone
answered = answers_alone()
print("loading ...", flush=True)
for number, line in enumerate(sys.stdin):
    new = json.loads(line)["new"]
    if number == 2:
        {fault}
    answered.write(json.dumps({{"tokens": [1] * new, "decode": [0.1] * (new - 1), "prefill": 0.2}}) + chr(10))
    answered.flush()
"""


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("raise RuntimeError('no such kernel')", "ended: RuntimeError: no such kernel"),
        ("os.kill(os.getpid(), 9)", "ended: killed, as the kernel does where memory runs out"),
        ("raise MemoryError", "ended: MemoryError"),
        ("new = new - 1", "gave 3 tokens in 3 steps; 4 were wanted, one by one"),
        ("print('no JSON', file=answered)", "unexpected JSONDecodeError"),
    ],
)
def test_a_peer_that_fails_costs_its_own_figures_alone(
    fault: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three fail, in the third round and before the first; the last one is measured to its end."""
    broken = module(tmp_path, monkeypatch, "broken_peer", PEER.format(fault=fault))
    whole = module(tmp_path, monkeypatch, "whole_peer", PEER.format(fault="pass"))

    def unprepared(*_: object) -> Any:
        raise KeyError("a weight that has no name there")

    for name, prepare in (("broken", ready), ("unprepared", unprepared), ("whole", ready)):
        runtime = peers.Runtime(name, {"numpy": "numpy"}, prepare, sees=name == "unprepared")
        monkeypatch.setitem(peers.PEERS, name, runtime)
    real = Worker.__init__

    def start(worker: Worker, engine: str, model: Path, threads: int, context: int, **more: Any) -> None:
        more = {"broken": {"module": broken}, "whole": {"module": whole}}.get(engine, more)
        real(worker, engine, model, threads, context, **more)

    monkeypatch.setattr(Worker, "__init__", start)
    both = sides(bundled_model(), EngineName.ONNXRUNTIME)
    opened = {each.name: each.open(Asked("What?", (drawn_picture(),), ("drawn",))) for each in both}
    found = list(
        peers.measure_peers(
            ["broken", "unprepared", "whole"], both[0], opened, tokens=4, rounds=3, warm_up=1, progress=lambda *_: None
        )
    )
    for each in opened.values():
        each.close()
    first, *others, last = found
    assert isinstance(first, FailedPeer)
    assert (first.name, first.what) == ("broken", "text")
    assert why in first.why
    assert [each.what for each in others] == ["text", "a picture, dense", "a picture, CDPruner"]
    assert all(isinstance(each, FailedPeer) and "a weight that has no name there" in each.why for each in others)
    assert isinstance(last, Peer)
    assert last.stages["prefill"].sides["whole"].values == (0.2,) * 3


def ready(decoder: Path, *_: object) -> tuple[Path, str]:
    return decoder, "fp32"


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    return name


def test_where_ours_fails_beside_a_peer_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module(tmp_path, monkeypatch, "whole_peer", PEER.format(fault="pass"))
    real = Worker.__init__

    def start(worker: Worker, engine: str, model: Path, threads: int, context: int) -> None:
        if engine == "ours":
            real(worker, engine, tmp_path / "missing", threads, context)
        else:
            real(worker, engine, model, threads, context, module=whole)

    monkeypatch.setattr(Worker, "__init__", start)
    monkeypatch.setattr("svcli.bench.text_models.build_decoder", lambda *_: None)
    monkeypatch.setitem(peers.PEERS, "whole", peers.Runtime("whole", {"numpy": "numpy"}, ready))
    (graphs, _) = sides(bundled_model(), EngineName.ONNXRUNTIME)
    side = graphs.open(Asked("What?", (drawn_picture(),), ("drawn",)))
    with pytest.raises(WorkerError, match="ours ended"):
        list(
            peers.measure_peers(
                ["whole"], graphs, {"dense": side}, tokens=4, rounds=2, warm_up=1, progress=lambda *_: None
            )
        )
    side.close()


def test_where_the_decoder_cannot_be_handed_over_every_peer_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    (graphs, _) = sides(bundled_model(), EngineName.ONNXRUNTIME)
    side = graphs.open(Asked("What?", (drawn_picture(),), ("drawn",)))
    there_is_no_room = OSError(28, "No space left on device", "/somewhere")

    def full(*_: object) -> None:
        raise there_is_no_room

    monkeypatch.setattr("svcli.bench.text_models.build_decoder", full)
    asked = {"tokens": 4, "rounds": 2, "warm_up": 1}
    found = list(
        peers.measure_peers(["transformers", "llama.cpp"], graphs, {"dense": side}, **asked, progress=lambda *_: None)
    )
    side.close()
    why = "/somewhere: No space left on device"
    assert found == [FailedPeer(name=name, why=why) for name in ("transformers", "llama.cpp")]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(peers.PEERS))
def test_a_peer_takes_turns_with_ours(name: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from svcli.app import app
    from svcli.bench.report import read_report

    if any(find_spec(module) is None for module in peers.PEERS[name].packages):
        missing(name)
    path = tmp_path / "a.json"
    options = ["--rounds", "2", "--warm-up", "1", "--tokens", "3", "-q", "--peer", name, "--json", str(path)]
    shown = CliRunner().invoke(app, ["bench", *options])
    assert shown.exit_code == 0, shown.output
    (peer,) = (each for each in read_report(path).peers if each.what == "text")
    assert peer.rows == read_report(path).sides["dense"].prompt_rows
    assert list(peer.stages) == ["prefill", "decode"]
    for stage in peer.stages.values():
        assert list(stage.sides) == [name, "ours"]
        assert {len(figure.values) for figure in stage.sides.values()} == {2}
    assert peer.weights.startswith("the same decoder weights, in ")
    assert peer.title in shown.stdout
    assert peer.title == f"{name} {peer.version} on {peer.rows} rows of text"
