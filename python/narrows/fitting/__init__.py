"""What happens between an estimator's `fit(X)` and a trained network.

Reading order: `parameters` (are they sound) -> `inputs` (is X sound) -> `table` (rows that belong together) ->
`network` (the specification and first weights) -> `run` (training) -> `files` (the model file).
"""
