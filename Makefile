# Everything that people and CI call. `make` alone lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
SUPERBATCH := target/debug/superbatch
READY := $(VENV)/.superbatch-ready

CARGO_FLAGS := --workspace --features $(shell scripts/features.sh)
EXTENSION := client/python/python/superbatch/_superbatch.abi3.so
# The kernels for Python are linked apart: features of the server's would bring LibTorch along (docs/decisions/0003).
KERNELS := scoring-kernels/python/python
KERNELS_EXTENSION := $(KERNELS)/superbatch_kernels/_kernels.abi3.so
# What benchmarks run: all of it is built for release, and the extensions in the tree stay those of `make build`.
RELEASED := SUPERBATCH_BINARY=$(CURDIR)/target/release/superbatch PYTHONPATH=$(CURDIR)/target/release/python:.:tests/python $(PYTHON)
# JPEG's vector code, where its assembler is there, for cargo commands of one crate.
JPEG_SIMD = $(if $(findstring jpeg-simd,$(shell scripts/features.sh)),--features jpeg-simd)

export HF_HUB_OFFLINE := 1
# Nested futures of a build that is hardly optimised pass the 2 MiB that test threads have by default.
export RUST_MIN_STACK := 16777216
# Documentation tests run from a folder of their own, where the binaries' relative path to LibTorch leads nowhere.
export LD_LIBRARY_PATH := $(CURDIR)/$(VENV)/torch/lib:$(LD_LIBRARY_PATH)
export SUPERBATCH_PYTHON := $(CURDIR)/$(PYTHON)
# The demo reads these: QUICK=1, SEEDS=0,1,2, POOL=flat, VALIDATE=1, DEMO_OUT=folder, DEMO_CACHE=folder.
export QUICK SEEDS POOL VALIDATE DEMO_OUT DEMO_CACHE

.PHONY: bench help setup build build-release test test-rust test-python test-deploy test-upgrade chaos soak load fuzz images wheel demo docs docs-site check fmt bench-kernels bench-service bench-direct bench-tars bench-embed bench-images bench-inputs bench-open bench-step test-gpu clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(READY) ## The Python environment with torch, in .venv (says what is missing)

$(READY): requirements.txt scripts/setup.sh scripts/libtorch.sh
	scripts/setup.sh $(VENV)
	touch $@

# Extensions are written beside the old ones, then renamed: running processes have those mapped.
build: $(READY) ## The superbatch binary, and the Python client and kernels into .venv
	cargo build $(CARGO_FLAGS)
	cp -f target/debug/lib_superbatch.so $(EXTENSION).new && mv -f $(EXTENSION).new $(EXTENSION)
	cargo rustc -p superbatch-kernels-python --features extension-module --crate-type cdylib
	cp -f target/debug/lib_kernels.so $(KERNELS_EXTENSION).new && mv -f $(KERNELS_EXTENSION).new $(KERNELS_EXTENSION)
	printf '%s\n' $(CURDIR)/client/python/python $(CURDIR)/$(KERNELS) \
	  > $$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/superbatch.pth

build-release: $(READY) ## The same for release, for benchmarks: in target/release, and the packages in target/release/python
	cargo build --release -p superbatch-server -p superbatch-python --features $(shell scripts/features.sh)
	cargo rustc --release -p superbatch-kernels-python --features extension-module --crate-type cdylib
	scripts/release_python.sh

test: build test-rust test-python docs-site ## All tests, from nothing
	scripts/test-deploy.sh

test-rust: $(READY)
	cargo test $(CARGO_FLAGS) --no-fail-fast

# What native libraries write is not captured: if one aborts the runner, its last words say why, and a capture would be lost.
# What was skipped is listed at the end, with what it needs. Two files run at a time: a test waits for other processes as long as it works.
test-python: build
	$(PYTHON) -m pytest -n 2 --dist loadfile -rs --capture=sys tests/python client/python/tests scoring-kernels/python/tests

test-upgrade: build ## Runs of an older build go on with this one, under a rolling replacement too (FROM=commit; builds it: minutes)
	scripts/test-upgrade.sh $(FROM)

test-deploy: build ## The chart, on a real Kubernetes API server too, alerts, dashboard and images (builds what it needs where Go is)
	scripts/test-deploy.sh all

# CHAOS_OUT=folder: where logs and inputs go instead of a new temporary folder.
export KILLS SECONDS SEED CHAOS_OUT STEPS RUNS RANKS RATE BF16

chaos: build ## Kills, pauses and storage faults at random, compared with an undisturbed run (KILLS=200; SECONDS=3600; SEED=n)
	PYTHONPATH=.:tests/python $(PYTHON) -m chaos

soak: build ## A long run at small scale: memory, descriptors, state and latency as it goes (STEPS=10000)
	PYTHONPATH=.:tests/python $(PYTHON) tests/python/soak.py

load: build-release ## Many ranks that ask for ready steps: p50, p99, requests a second, memory (RUNS=64; RANKS=16; RATE=200; SECONDS=20)
	cargo build --release -p superbatch-client --example load
	$(RELEASED) tests/python/load.py

fuzz: ## Fuzzes all readers of what others make, or one, each for so long (SECONDS=60; TARGET=tar)
	scripts/fuzz.sh $(or $(SECONDS),60) $(TARGET)

images: ## The images, with docker or buildah (scripts/images.sh TARGET... builds single ones)
	scripts/images.sh

wheel: $(READY) ## Wheels in target/wheels, each tried in a fresh environment: the client, the kernels, and the server for the torch beside it
	for folder in client/python scoring-kernels/python; do \
	  (cd $$folder && VIRTUAL_ENV=$(CURDIR)/$(VENV) $(CURDIR)/$(VENV)/bin/maturin build --release); \
	done
	cargo build --release -p superbatch-server --features "$(shell scripts/features.sh | cut -d, -f2- -s)"
	$(PYTHON) scripts/server_wheel.py target/release/superbatch target/wheels
	$(PYTHON) scripts/try_wheels.py target/wheels/*.whl

demo: ## uniform, a filter, joint, approximate (flexi) and independent selection side by side (QUICK=1; SEEDS=0,1,2; POOL=flat; VALIDATE=1; DEMO_OUT=folder)
	@scripts/need.sh cargo npm
	@$(MAKE) --no-print-directory build
	$(PYTHON) -m examples.demo

docs: build ## Regenerates the pages of docs/ that are made of code: configuration, metrics, protocol, python
	$(SUPERBATCH) docs docs
	$(PYTHON) docs/site/protocol_page.py
	$(PYTHON) docs/site/python_page.py

SITE := target/site-venv
docs-site: $(SITE)/ready ## The documentation as a site that needs no network, in target/site; fails where a link leads nowhere
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --quiet

$(SITE)/ready: docs/site/requirements.txt
	$$(scripts/python.sh) -m venv --clear $(SITE)
	$(SITE)/bin/pip install --quiet --disable-pip-version-check --requirement docs/site/requirements.txt
	touch $@

check: $(READY) ## Formatting, lints and, if cargo-deny is there, dependencies
	cargo fmt --all --check
	rustfmt --edition 2024 --check fuzz/src/main.rs
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	cargo clippy --workspace --all-targets -- -D warnings
	cargo check -p superbatch-server --no-default-features --target-dir target/without-torch
	scripts/deny.sh

fmt: $(READY) ## Formats the code
	cargo fmt --all
	rustfmt --edition 2024 fuzz/src/main.rs
	$(VENV)/bin/ruff format .

bench: $(READY) ## All benchmarks, built for release; one table of ratios in target/bench.tsv, beside that of docs/bench.tsv
	$(PYTHON) scripts/bench.py

bench-kernels: $(READY) ## Joint selection against NumPy, PyTorch and the machine's matrix product, as ratios of one run
	cargo bench -p superbatch-kernels --no-default-features --bench peers

bench-service: build-release ## Serving rows and taking weights against other ways to move the same bytes, as ratios of one run (BF16=0)
	cargo build --release -p superbatch-client --example plain
	$(RELEASED) tests/python/bench_service.py

bench-direct: build-release ## The coordinator's bytes and processor time a step, with rows through it and from the workers
	$(RELEASED) tests/python/bench_direct.py

bench-tars: build-release ## Rows of tars, shuffled and by range, against webdataset in sequence, as a ratio of one run (SHARDS=4)
	$(RELEASED) tests/python/bench_tars.py

bench-embed: $(READY) ## Pairs a second of one worker's device on the CPU against PyTorch eager and torch.compile, as ratios of one run
	cargo build --release -p superbatch-server --example bench_embed
	HF_HUB_OFFLINE=1 LD_LIBRARY_PATH=.venv/torch/lib PYTHONPATH=.:tests/python $(PYTHON) tests/python/bench_embed.py $(ARGS)

bench-images: $(READY) ## Decoding and resizing against Pillow, as ratios of one run
	cargo bench -p superbatch-images $(JPEG_SIMD) --bench pillow

bench-inputs: $(READY) ## A worker's whole input path against WebDataset with torchvision, and a loop with simplejpeg, as ratios of one run
	cargo build --release -p superbatch-server $(JPEG_SIMD) --example bench_inputs
	PYTHONPATH=.:tests/python $(PYTHON) tests/python/bench_inputs.py

bench-open: $(READY) ## Opening a long run by its summaries against reading every fact, as a ratio of one run (STEPS=1000000; PUSHES=10000)
	cargo run --release -p superbatch-server --no-default-features --example open_run -- $(or $(STEPS),1000000) $(or $(PUSHES),10000)

bench-step: $(READY) ## A step's own costs beside its selection, a receipt beside one write, a run over a million shards (PAPER=1: B=163,840, minutes)
	cargo bench -p superbatch-server --no-default-features --bench step
	$(if $(PAPER),cargo bench -p superbatch-server --no-default-features --bench step -- step 163840 32768 768 1)

test-gpu: ## Conformance, parity and end-to-end tests on a CUDA device, from binaries built here or before
	scripts/test-gpu.sh

clean: ## Removes target/ (build, demo results and the demo's cache); .venv stays
	rm -rf target
