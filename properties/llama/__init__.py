"""flashcore inside Llama-family models, compared with the references and with the library's own attention.

``capture`` and ``activations`` need no transformers; the other modules do.
"""
