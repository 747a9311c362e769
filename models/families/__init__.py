"""Published models: configuration and weight names, translated both ways. `config.json`'s model_type x means `x.py`.

A family file holds `config_from(config.json's mapping) -> ModelConfig`, its inverse `config_to`, and
`tensor_names(config)`, a table from each of our tensors to Transformers' spelling of it. Nothing is registered.
"""
