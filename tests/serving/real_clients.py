"""Clients that others wrote, each run once against a real server of a small model on this machine.

python tests/serving/real_clients.py                       # all of them; needs palm-rlhf[serve], and npm for Node
python tests/serving/real_clients.py --only litellm llm    # some of them
python tests/serving/real_clients.py --folder clients      # keeps what is installed there, for the next time

Each client gets an environment of its own, into which it is installed from PyPI or npm. Prints a table of what worked,
and ends with status 1 where something did not.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from palm_rlhf.data.conversation import encode
from palm_rlhf.data.templates import JinjaTemplate
from palm_rlhf.data.tokenizer import HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.run_server import running
from palm_rlhf.serving.served_model import load

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE / "real_clients"
DIALOGUES = {"Hello": "Hi there! How are you?", "Count.": "1 2 3 4 5 6 7 8 9 10"}
LLM_MODELS = """\
- model_id: palm
  model_name: {model}
  api_base: {url}/v1
  supports_schema: true
  supports_tools: true
"""


@dataclass(frozen=True)
class Place:
    """Where one client is run: its own folder, and the server that it asks."""

    folder: Path
    url: str
    checkpoint: Path

    @property
    def model(self) -> str:
        return self.checkpoint.name

    def python(self, package: str) -> Path:
        """The programs of an environment that has a package."""
        programs = self.folder / "bin"
        if not (programs / "pip").exists():
            venv.create(self.folder, with_pip=True)
        run(str(programs / "pip"), "install", "-q", package)
        return programs

    def version(self, package: str) -> str:
        """The version of a package that is installed there."""
        return re.search(r"^Version: (.+)$", run(str(self.folder / "bin" / "pip"), "show", package), re.M).group(1)


def run(*command: str, cwd: Path | None = None, **variables: str) -> str:
    """What a program says; RuntimeError with all of it where it fails."""
    environment = {
        **os.environ,
        "OPENAI_API_KEY": "none",
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
        **variables,
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def litellm(place: Place) -> tuple[str, str]:
    """What worked with litellm, and its version."""
    programs = place.python("litellm")
    found = run(str(programs / "python"), str(PROGRAMS / "with_litellm.py"), place.url, place.model)
    return found, place.version("litellm")


def langchain(place: Place) -> tuple[str, str]:
    """The same for langchain-openai."""
    programs = place.python("langchain-openai")
    found = run(str(programs / "python"), str(PROGRAMS / "with_langchain.py"), place.url, place.model)
    return found, place.version("langchain-openai")


def llm(place: Place) -> tuple[str, str]:
    """The same for the command llm, with the file by which it is told of other servers."""
    program = str(place.python("llm") / "llm")
    home = place.folder / "home"
    home.mkdir(exist_ok=True)
    (home / "extra-openai-models.yaml").write_text(LLM_MODELS.format(url=place.url, model=place.model))
    options = ("-m", "palm", "--key", "none", "-o", "temperature", "0")
    for how in ((), ("--no-stream",)):
        said = run(program, *options, *how, "Hello", LLM_USER_PATH=str(home)).strip()
        assert said == DIALOGUES["Hello"], said
    animal = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"]}
    schema = json.dumps({**animal, "additionalProperties": False})
    reply = json.loads(run(program, *options, "--schema", schema, "Hello", LLM_USER_PATH=str(home)))
    assert reply["legs"] in (2, 4), reply
    return "prompt, stream, schema", place.version("llm")


def guidellm(place: Place) -> tuple[str, str]:
    """The same for guidellm, a load generator: a short benchmark of chats, one of completions, and one of responses."""
    program = str(place.python("guidellm") / "guidellm")
    paths = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
    for path in paths:
        file = place.folder / "report.json"
        run(
            *(program, "run", "--disable-console", "--profile", "kind=concurrent,streams=2"),
            *("--backend", f"kind=openai_http,target={place.url},model={place.model},request_format={path}"),
            *("--tokenizer", f"kind=huggingface_auto,model={place.checkpoint}"),
            *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
            *("--constraint", "kind=max_requests,count=6", "--output", f"kind=json,path={file}"),
            HF_HUB_OFFLINE="1",
        )
        [benchmark] = json.loads(file.read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        assert (totals["successful"], totals["errored"]) == (6, 0), (path, totals)
    return f"benchmarks of {', '.join(paths)}", place.version("guidellm")


def node(place: Place) -> tuple[str, str]:
    """The same for openai's client for Node."""
    place.folder.mkdir(exist_ok=True)
    if not (place.folder / "node_modules" / "openai").exists():
        run("npm", "install", "--silent", "--no-fund", "--prefix", str(place.folder), "openai", cwd=place.folder)
    program = place.folder / "with_openai.mjs"
    program.write_text((PROGRAMS / "with_openai.mjs").read_text())  # modules are looked for beside it
    found = run("node", str(program), place.url, place.model, cwd=place.folder)
    package = (place.folder / "node_modules" / "openai" / "package.json").read_text()
    return found, re.search(r'"version": "(.+?)"', package).group(1)


CLIENTS: dict[str, Callable[[Place], tuple[str, str]]] = {
    "litellm": litellm,
    "langchain-openai": langchain,
    "llm": llm,
    "guidellm": guidellm,
    "openai-node": node,
}


def train(folder: Path) -> None:
    """Saves a model that has learnt a few dialogues by heart, whose tokenizer others can open too."""
    torch.manual_seed(0)
    template = JinjaTemplate((HERE / "tools.jinja").read_text())
    texts = [*DIALOGUES, *DIALOGUES.values(), template.source]
    tokenizer = HuggingFaceTokenizer.train(texts * 4, 400)
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=64, depth=2, heads=4, dim_head=16, max_seq_len=2048)
    rows = [
        encode([{"role": "user", "content": said}, {"role": "assistant", "content": reply}], tokenizer, template)
        for said, reply in DIALOGUES.items()
    ]
    tokens = torch.nn.utils.rnn.pad_sequence([row.tokens.long() for row in rows], batch_first=True)
    loss_mask = torch.nn.utils.rnn.pad_sequence([row.weights > 0 for row in rows], batch_first=True)
    optimizer = torch.optim.AdamW(palm.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(100):
        loss = palm(tokens, return_loss=True, loss_mask=loss_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for part in (palm, tokenizer, template):
        part.save_pretrained(folder)


def main(only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLIENT")] = (*CLIENTS,), folder: Path | None = None):
    """Run clients that others wrote against a server of a small model.

    Args:
        only: The clients to run.
        folder: Where clients are installed; a temporary folder by default.
    """
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "parrot"
        train(checkpoint)
        served_model = load(checkpoint, device="cpu")
        with (
            Engine(served_model.palm, served_model.tokenizer, EngineConfig()) as engine,
            running(create_app(served_model, engine)) as url,
        ):
            for name in only:
                place = Place((folder or Path(temporary)).resolve() / name, url, checkpoint)
                try:
                    found, version = CLIENTS[name](place)
                    print(f"{name:18}{version:12}{found.strip().splitlines()[-1]}", flush=True)
                except Exception as error:
                    failed += 1
                    print(f"{name:18}failed      {error}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    tyro.cli(main)
