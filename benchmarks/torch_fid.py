"""Hugging Face's T5 in PyTorch, used as FiD: passages are encoded separately and decoded together.

Uses the fastest variant at each size: of two attentions, three ways to generate an answer and the
encoder with and without `torch.compile`; and of two attentions for a training step.
"""

import copy
import itertools
import time
import warnings
from typing import Any

import numpy as np

from benchmarks import peaks
from benchmarks.setting import LEARNING_RATE, Setting, t5_config
from glimmer_jax.weights.huggingface_names import write_config

ATTENTION = ("eager", "sdpa")
GENERATION = ("generate", "loop_dynamic_cache", "loop_static_cache")
ENCODER = ("plain", "compiled")
TRIALS = 2  # per variant; the faster counts


class TorchFid:
    """Answers one question at a time."""

    VARIANTS: tuple[tuple[str, ...], ...] = tuple(itertools.product(ATTENTION, GENERATION, ENCODER))
    # PyTorch's counter supports the products of eager attention on every device.
    COUNTED: tuple[str, ...] = ("eager", "loop_dynamic_cache", "plain")

    def __init__(self, system: str, dtype: str, setting: Setting):
        assert system == "pytorch_fid"
        import torch
        import transformers

        torch.set_num_threads(setting.threads)
        torch.manual_seed(0)
        self._torch, self._transformers = torch, transformers
        self.setting, self._dtype = setting, dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        t5 = t5_config(setting, "float32", on_cpu=True)
        config = transformers.T5Config.from_dict(write_config(t5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from transformers
            model = transformers.T5ForConditionalGeneration(config)
        self._model = model.eval()
        if dtype != "int8":
            self._model.to(self.device, getattr(torch, dtype))
        self._compiled: dict[str, Any] = {}
        self._counted: dict[int, int] = {}
        self._vocab_size = t5.vocab_size
        self._random = np.random.default_rng(0)
        self._best: dict[int, tuple[str, ...]] = {}
        decoder = (*self._model.decoder.block.parameters(), *self._model.lm_head.parameters())
        self.decoder_bytes = sum(parameter.nbytes for parameter in decoder)
        if dtype == "int8":
            self.decoder_bytes //= 4
            # PyTorch's counter leaves quantised products out.
            self._counted = {passages: self.flops(passages) for passages in setting.passages}
            self._model = _quantised(self._model)
        on = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        self.details: dict[str, Any] = {
            "framework": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "device": on,
        }

    def close(self) -> None:
        """Nothing to clean up."""

    def batch(self, passages: int) -> Any:
        """int64 `[K, Q + P]`, question and passage concatenated."""
        length = self.setting.question + self.setting.passage
        tokens = self._random.integers(2, self._vocab_size, (passages, length))
        return self._torch.tensor(tokens, device=self.device)

    def prepare(self, passages: int) -> None:
        """Tries all variants and selects the fastest."""
        seconds = {}
        for variant in self.VARIANTS:
            self.run(passages, *variant)
            times = []
            for _ in range(TRIALS):
                start = time.perf_counter()
                self.run(passages, *variant)
                times.append(time.perf_counter() - start)
            seconds[variant] = min(times)
        self._best[passages] = min(seconds, key=seconds.__getitem__)
        self.details |= {
            "variant": " ".join(self._best[passages]),
            "variants": {" ".join(name): round(value, 4) for name, value in seconds.items()},
        }

    def answer(self, passages: int) -> np.ndarray:
        """int `[T]`."""
        return self.run(passages, *self._best[passages])

    def run(self, passages: int, *variant: str) -> np.ndarray:
        """Answers one question with the given attention, way to generate, and encoder."""
        attention, generation, encoder = variant
        self._use(attention)
        with self._torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from torch.compile
            program = self._model.encoder if encoder == "plain" else self._compile(attention)
            answer = getattr(self, f"_{generation}")(*self._encode(program, self.batch(passages)))
        return answer[0].cpu().numpy()

    def _compile(self, attention: str) -> Any:
        # One program per attention, since it is traced with the attention of its first run.
        if attention not in self._compiled:
            encoder = copy.deepcopy(self._model.encoder)
            self._compiled[attention] = self._torch.compile(encoder)
        return self._compiled[attention]

    def _use(self, attention: str) -> None:
        model = self._model
        for config in (model.config, model.encoder.config, model.decoder.config):
            config._attn_implementation = attention

    def _encode(self, encoder: Any, tokens: Any) -> tuple[Any, Any]:
        """Float `[1, K * (Q + P), D]` and its mask."""
        mask = self._torch.ones_like(tokens)
        states = encoder(tokens, attention_mask=mask).last_hidden_state
        return states.reshape(1, -1, states.shape[-1]), mask.reshape(1, -1)

    def _generate(self, states: Any, mask: Any) -> Any:
        length = self.setting.answer
        encoded = self._transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)
        tokens = self._model.generate(
            encoder_outputs=encoded,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=length,
            max_new_tokens=length,
        )
        return tokens[:, 1:]

    def _loop_dynamic_cache(self, states: Any, mask: Any) -> Any:
        return self._loop(states, mask, self._transformers.DynamicCache())

    def _loop_static_cache(self, states: Any, mask: Any) -> Any:
        cache = self._transformers.StaticCache(
            config=self._model.decoder.config, max_cache_len=self.setting.answer
        )
        return self._loop(states, mask, cache)

    def _loop(self, states: Any, mask: Any, own: Any) -> Any:
        cache = self._transformers.EncoderDecoderCache(own, self._transformers.DynamicCache())
        last = self._torch.zeros((1, 1), dtype=self._torch.long, device=self.device)
        tokens = []
        for _ in range(self.setting.answer):
            out = self._model.decoder(
                input_ids=last,
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
            last = self._model.lm_head(out.last_hidden_state).argmax(-1)
            tokens.append(last)
        return self._torch.cat(tokens, 1)

    def flops(self, passages: int) -> int:
        """FLOPs of one run, from PyTorch's counter."""
        from torch.utils.flop_counter import FlopCounterMode

        if passages in self._counted:
            return self._counted[passages]
        with FlopCounterMode(display=False) as counter:
            self.run(passages, *self.COUNTED)
        return int(counter.get_total_flops())

    def peaks(self) -> dict[str, float]:
        """Measured peak rates of the device (`peaks.torch_peaks`); int8 has those of float32."""
        dtype = "float32" if self._dtype == "int8" else self._dtype
        return peaks.torch_peaks(dtype, self.device)

    def reset_peak(self) -> None:
        """Starts a new measurement of peak memory."""
        if self.device == "cuda":
            self._torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Peak device memory; None on a CPU."""
        return self._torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def _quantised(model: Any) -> Any:
    """The model with int8 weights in its linear layers; activations are quantised as they come."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


class TorchTraining(TorchFid):
    """Trains on one question at a time: Adafactor, and for bfloat16 automatic mixed precision."""

    VARIANTS = tuple((attention,) for attention in ATTENTION)
    COUNTED = ("eager",)

    def __init__(self, system: str, dtype: str, setting: Setting):
        super().__init__(system, "float32", setting)
        self._dtype = dtype
        self.decoder_bytes = 0  # A step reads weights once, whatever the length of the answer.
        self._model.train()
        # As ours and T5X's: a constant rate, relative to each parameter's scale.
        self._optimizer = self._transformers.Adafactor(
            self._model.parameters(), lr=LEARNING_RATE, scale_parameter=True, relative_step=False
        )

    def run(self, passages: int, *variant: str) -> np.ndarray:
        """One update with the given attention; returns the loss."""
        torch = self._torch
        self._use(*variant)
        size = (1, self.setting.answer)
        answer = torch.tensor(self._random.integers(2, self._vocab_size, size), device=self.device)
        mixed = self._dtype == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16, enabled=mixed):
            states, mask = self._encode(self._model.encoder, self.batch(passages))
            output = self._transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)
            loss = self._model(encoder_outputs=output, attention_mask=mask, labels=answer).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach().cpu().numpy()
