# make demo                the whole path on SmolLM2-135M: quantize, measure, serve and ask before and after
# make demo MODEL=<...>    the same on a folder or a Hugging Face name
# make test                format, lint, types, tests
# make install             .venv with everything the two above need (they call it)
# make clean               forget .venv and the demo's models

VENV := .venv
MODEL ?=

.PHONY: demo test install clean

demo: install
	@$(VENV)/bin/python examples/demo.py $(if $(MODEL),"$(MODEL)")

test: install
	@scripts/check.sh

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py $(wildcard mergequant_vllm/csrc/*.* mergequant_vllm/csrc/*/*) scripts/install.sh scripts/name_vllm.py
	@scripts/install.sh $(VENV)

clean:
	rm -rf $(VENV) .demo .mypy_cache .ruff_cache .pytest_cache build
