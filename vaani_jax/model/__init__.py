"""The language model, file by file from its config to the whole transformer.

Axes, everywhere in this project:

    B batch            N query heads         D model width
    T query position   K key-value heads     F feed-forward width
    S key position     H head dimension      V vocabulary

Capitals in einsums; a suffix (``q_BTNH``) where axes change.

The block is the one of microsoft/bitnet-b1.58-2B-4T and of `BitNetForCausalLM` in
transformers: a Llama block whose linear layers are ternary, with two sub-norms, one on
the attention output before ``o_proj`` and one on the gated product before
``down_proj``.

Parameters: ``embedding`` [V, D]; ``layers_<i>`` (or ``layers``, stacked, under
`scan_layers`), each a `TransformerBlock`; ``final_norm``; ``lm_head`` [D, V] where the
head is not tied. Kernels are [in, out]. The collection ``quant`` mirrors that tree with
what the quantizers keep: thresholds, and activation ranges where they are tracked.
"""
