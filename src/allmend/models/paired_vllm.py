# mypy: disable-error-code="misc"
"""Paired models in vLLM: its own layers of Llama, each as wide as `layer_widths` tells.

Mistral's, Phi-3's, Qwen2's and Qwen3's layers are Llama's but for biases, fused matrices and norms of single heads. So
all of them are built from vLLM's Llama, by a configuration for each layer; scheduling, cache, tensor and pipeline
parallelism, quantisation and LoRA are vLLM's. Its cache has the key-value heads that each layer says it has.

Only vLLM imports this file, by the names in `allmend.models.vllm_plugin`.
"""

from typing import Any, ClassVar

import torch
import vllm
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from allmend.errors import UserError
from allmend.models.modeling_paired import LayerConfig
from allmend.models.vllm_plugin import KNOWN, check_processes, check_version


def width_at(config: Any, prefix: str) -> int:
    """The width of the layer that a module's name, such as `model.layers.3.self_attn`, is in."""
    widths: list[int] | None = config.layer_widths
    return widths[extract_layer_index(prefix)] if widths else 1


class PairedLlamaLayer(LlamaDecoderLayer):
    """A decoder layer of the width that its place has."""

    attention: ClassVar[type[nn.Module]] = LlamaAttention

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        own = LayerConfig(config, width_at(config, prefix))
        self.adapt(own)
        super().__init__(vllm_config, prefix, own, self.attention)

    def adapt(self, config: Any) -> None:
        """Say in Llama's words what the architecture does otherwise."""


class PairedQwen2Layer(PairedLlamaLayer):
    """Queries, keys and values have biases, the output projection has none."""

    def adapt(self, config: Any) -> None:
        config.attention_bias, config.qkv_bias = False, True


class HeadNorm(nn.Module):
    """RMS norm of single heads, with a gain for each of them.

    Args:
        heads: of the layer, on all processes.
        share: of them, on this one.
        size: of a head.
        epsilon: added to the mean square.
    """

    def __init__(self, heads: int, share: int, size: int, epsilon: float) -> None:
        super().__init__()
        self.heads, self.epsilon = heads, epsilon
        self.weight = nn.Parameter(torch.ones(share, size))
        set_weight_attrs(self.weight, {"weight_loader": self.load})

    def load(self, parameter: nn.Parameter, gains: torch.Tensor) -> None:
        """Take this process's rows of the gains, [heads, size]."""
        share, size = parameter.shape
        if gains.shape != (self.heads, size):
            raise ValueError(f"gains of {self.heads} heads of {size} were expected, and have the shape {gains.shape}")
        # where processes outnumber the heads, several have the same one
        first = get_tensor_model_parallel_rank() * self.heads // get_tensor_model_parallel_world_size()
        parameter.data.copy_(gains[first : first + share])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of x, [tokens, share, size]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return normed.to(x.dtype) * self.weight


class PairedQwen3Attention(LlamaAttention):
    """Queries and keys are normed head by head, in a layer of several with gains for each head."""

    def __init__(self, config: Any, *, prefix: str, **named: Any) -> None:
        super().__init__(config=config, prefix=prefix, **named)
        size, epsilon = self.head_dim, config.rms_norm_eps
        if width_at(config, prefix) == 1:
            self.q_norm, self.k_norm = RMSNorm(size, eps=epsilon), RMSNorm(size, eps=epsilon)
        else:
            self.q_norm = HeadNorm(self.total_num_heads, self.num_heads, size, epsilon)
            self.k_norm = HeadNorm(self.total_num_kv_heads, self.num_kv_heads, size, epsilon)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of positions, [tokens], and the stream, [tokens, hidden_size]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.view(-1, self.num_heads, self.head_dim)).view(q.shape)
        k = self.k_norm(k.view(-1, self.num_kv_heads, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        output: torch.Tensor = self.o_proj(self.attn(q, k, v))[0]
        return output


class PairedQwen3Layer(PairedLlamaLayer):
    """Its attention norms queries and keys."""

    attention = PairedQwen3Attention


class PairedLlamaForCausalLM(LlamaForCausalLM):
    """Llama or Mistral with layers of different widths."""

    layer: ClassVar[type[nn.Module]] = PairedLlamaLayer

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_version(vllm.__version_tuple__)
        check_processes(vllm_config.model_config.hf_config, get_tensor_model_parallel_world_size())
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer)


class PairedPhi3ForCausalLM(PairedLlamaForCausalLM):
    """Phi-3 with layers of different widths, whose matrices are stored as vLLM has them."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["qkv_proj"],
        "gate_up_proj": ["gate_up_proj"],
    }


class PairedQwen2ForCausalLM(PairedLlamaForCausalLM):
    """Qwen2 with layers of different widths."""

    layer = PairedQwen2Layer


class PairedQwen3ForCausalLM(PairedLlamaForCausalLM):
    """Qwen3 with layers of different widths."""

    layer = PairedQwen3Layer


class NotInVllm(LlamaForCausalLM):
    """An architecture whose paired models only transformers runs."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        raise UserError(
            f"{vllm_config.model_config.architecture} does not run in vLLM",
            hint=f"Paired models of {KNOWN} do. Transformers runs this one.",
        )
