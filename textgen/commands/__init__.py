"""The commands of `textgen`, one module each: flags in, printed results out. Nothing is computed here.

- `parsing`: flags and YAML to a frozen config, or to one line with the error
- `model_argument`: the flags that choose a checkpoint, and the model that they open
- `state_argument`: the flags of kept states: a text that is read once
- `texts_argument`: the flags that name the texts of `score` and `tokenize`
- `prompts`: the prompts of `sample`, from flags and files
- `batch_output`: a file of samples that a later run of `sample` continues
- `train`: train
- `prepare`: encode the text of a training ahead of time
- `tune`: find a learning rate by short trainings
- `evaluate`: bits per byte of a checkpoint
- `score`: the log-probability of each token of texts
- `tokenize`: the tokens of texts, or the text of tokens
- `verify`: check every byte of a checkpoint
- `sample`: continue prompts
- `play`: write a text in turns with a model
- `classify`: the labels of texts; trains a head
- `serve`: answer OpenAI's completions API over HTTP
- `export`: int8 and ONNX decoders as files
- `publish`: a model and its card as a folder, or on the hub
- `compare`: a table of runs
- `report`: a page of runs
- `measure`: generated texts beside human ones
- `dashboard`: a W&B workspace
- `doctor`: check a machine or an allocation
- `submit`: hand a training to Slurm
"""
