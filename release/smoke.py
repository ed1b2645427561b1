"""What shows that each extra works: commands that do what it is for."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from release.place import Place, UntriedError, expect

PICTURE = "examples/hamburgers.png"
QUESTION = "How many hamburgers are there?"
ANSWER = "There are 6 hamburgers."
LACKING = 3
"""svcli's exit code for what this machine lacks."""


def bare(place: Place) -> str:
    """Help and versions without any engine, and which extra is missing."""
    expect(place.run("svcli", "--version").startswith("svcli "), "no version")
    expect("Examples:" in place.run("svcli", "--help"), "no examples in the help")
    said = place.run("svcli", "chat", PICTURE, QUESTION, expected=LACKING)
    expect('pip install "svcli[cpu]"' in said, f"no remedy: {said}")
    return "help, versions, and the extra that is missing"


def cpu(place: Place) -> str:
    said = place.run("svcli", "chat", "--quiet", PICTURE, QUESTION)
    expect(said.strip() == ANSWER, f"another answer: {said}")
    place.run("svcli", "doctor")
    place.run("svcli", "inspect")
    absent = place.python("import importlib.util as u; print(u.find_spec('torch') is None)")
    expect(absent.strip() == "True", "torch is there")
    return "chat answers right, without torch"


def gpu(place: Place) -> str:
    said = place.run("svcli", "chat", "--quiet", PICTURE, QUESTION)
    expect(said.strip() == ANSWER, f"another answer: {said}")
    if not _has_gpu():
        said = place.run("svcli", "chat", "--engine", "onnxruntime-cuda", PICTURE, QUESTION, expected=LACKING)
        raise UntriedError(f"answers on the CPU; no GPU here, which it says: {said.strip().splitlines()[-1][:120]}")
    said = place.run("svcli", "chat", "--quiet", "--engine", "onnxruntime-cuda", PICTURE, QUESTION)
    expect(said.strip() == ANSWER, f"another answer on the GPU: {said}")
    return "chat answers right on the GPU"


def torch(place: Place) -> str:
    bundled = place.python("from svcli.settings import bundled_model as b; print(b())").strip()
    place.run("svcli", "export", bundled, "-o", "fp32", "--precision", "fp32", "--no-variants", "--overwrite")
    place.run("svcli", "export", bundled, "-o", "fp16", "--precision", "fp16", "--no-variants", "--overwrite")
    said = place.run("svcli", "chat", "--quiet", "--model", "fp16", PICTURE, QUESTION)
    expect(said.strip() == ANSWER, f"another answer: {said}")
    place.run("svcli", "verify", "fp32", "--engines", "onnxruntime", "--images", PICTURE)
    return "exports in fp32 and fp16, and holds ONNX Runtime against PyTorch"


def train(place: Place) -> str:
    expect(
        "[optim]" in place.run("svcli", "train", "recipes/skipvision-tiny.toml", "--print-config"),
        "no recipe is printed",
    )
    _train(place, "run", "optim.steps=2")
    expect((place.folder / "run" / "checkpoint" / "model.safetensors").is_file(), "no checkpoint")
    return "prints a recipe, and two steps end in a checkpoint"


def loggers(place: Place) -> str:
    _train(place, "logged", "optim.steps=1", "log.tensorboard=true")
    expect(any((place.folder / "logged" / "tensorboard").rglob("events*")), "no events of TensorBoard")
    place.python("import wandb")
    return "a step is logged to TensorBoard; wandb imports"


def data(place: Place) -> str:
    place.run("svcli", "data", "fetch", "--help")
    code = 'import resvg_py; s = \'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>\';'
    place.python(f"{code} assert bytes(resvg_py.svg_to_bytes(svg_string=s))[1:4] == b'PNG'")
    return "an SVG is drawn; nothing was downloaded"


def serve(place: Place) -> str:
    log = place.folder / "server.txt"
    with log.open("w") as stream:
        command = [str(place.environment / "bin" / "svcli"), "serve", "--port", "0"]
        process = subprocess.Popen(command, cwd=place.folder, env=place.clean(), stderr=stream)
    try:
        until = time.monotonic() + 60
        while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            expect(process.poll() is None and time.monotonic() < until, f"no server: {log.read_text()}")
            time.sleep(0.1)
        with urllib.request.urlopen(f"{found[0]}/health", timeout=10) as answer:
            expect(answer.status == 200, f"/health says {answer.status}")
        body = {"model": "skipvision-tiny", "messages": [{"role": "user", "content": "what is this?"}]}
        request = urllib.request.Request(
            f"{found[0]}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            expect(bool(json.load(answer)["choices"][0]["message"]["content"]), "an empty answer")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            ended = process.wait(60)
        finally:
            process.kill()
    expect(ended in (0, 128 + signal.SIGTERM), f"after SIGTERM it ended with {ended}")
    return "starts, is healthy, answers, and ends after SIGTERM"


def evaluation(place: Place) -> str:
    """A task that is read from Parquet, of the example picture."""
    code = (
        "import pyarrow as pa, pyarrow.parquet as pq, pathlib;"
        f" data = pathlib.Path({PICTURE!r}).read_bytes(); pathlib.Path('pope').mkdir(exist_ok=True);"
        " row = dict(id='0', question_id='1', question='Is there a hamburger in the image?', answer='yes',"
        " image_source='examples', image=dict(bytes=data, path=None), category='adversarial');"
        " pq.write_table(pa.Table.from_pylist([row]), 'pope/test-00000-of-00001.parquet')"
    )
    place.python(code)
    command = ("svcli", "eval", "pope", "--data", "pope", "--split", "adversarial", "--only", "skipped")
    told = json.loads(place.run(*command, "--json", "--quiet"))
    expect(told["askers"]["skipped"]["answered"] == 1, f"not answered: {told}")
    return "a question is read from Parquet, asked and judged"


def ray(place: Place) -> str:
    """The application, without a cluster: what one does is tried by tests/server/test_ray.py."""
    place.python("from svcli.server.ray_serve import app; app({'replicas': '2', 'threads': '1'})")
    return "the application for Ray Serve is made; no replica was started"


def plots(place: Place) -> str:
    bundled = place.python("from svcli.settings import bundled_model as b; print(b())").strip()
    place.run("svcli", "profile", bundled, PICTURE, "-o", "figures")
    expect(len(list((place.folder / "figures").glob("*.png"))) == 3, "not three figures")
    return "three figures of a profile"


def rtx(place: Place) -> str:
    _need_fp16(place)
    place.run("svcli", "build-engine", "fp16", "--backend", "tensorrt-rtx", "--target", "sm_89")
    plans = list((place.folder / "fp16" / "plans").rglob("*.plan"))
    expect(len(plans) == 3, f"{len(plans)} plans")
    raise (
        UntriedError("plans are built for sm_89; none was run")
        if not _has_gpu()
        else UntriedError("plans were not run")
    )


def trt(place: Place) -> str:
    _need_fp16(place)
    said = place.run("svcli", "build-engine", "fp16", "--backend", "tensorrt", expected=LACKING)
    last = said.strip().splitlines()[-1]
    expect("tensorrt" in last.lower(), f"no remedy: {last}")
    raise UntriedError(f"no plan was built, which it says: {last[:160]}")


def _train(place: Place, output: str, *settings: str) -> None:
    if not (place.folder / "fp32").is_dir():
        raise UntriedError("the bundle in fp32, which `torch` leaves, is not there")
    given = [word for setting in ("base=fp32", *settings) for word in ("--set", setting)]
    place.run("svcli", "train", "recipes/tune-tiny.toml", "-o", output, "--fresh", *given)


def _need_fp16(place: Place) -> None:
    if not (place.folder / "fp16").is_dir():
        raise UntriedError("the bundle in fp16, which `torch` leaves, is not there")


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


EXTRAS: dict[str, tuple[str, Callable[[Place], str]]] = {
    "none": ("", bare),
    "cpu": ("cpu", cpu),
    "torch": ("cpu,torch", torch),
    "serve": ("cpu,serve", serve),
    "eval": ("cpu,eval", evaluation),
    "ray": ("cpu,serve,ray", ray),
    "rtx": ("cpu,rtx", rtx),
    "trt": ("cpu,trt", trt),
    "train": ("cpu,torch,train", train),
    "loggers": ("torch,train,loggers", loggers),
    "data": ("data", data),
    "plots": ("cpu,torch,plots", plots),
    "gpu": ("gpu", gpu),
}
"""By the extra that is tried: what is installed, and what shows that it works. `torch` leaves bundles for others."""
