"""One file a task; the model is its argument: configs/pretrain.py:llama2_7b."""
