"""OpenAI's completions API over HTTP, for many clients of one running batch, and a page to try a model.

- `access`: access control by host, origin and token; security headers, the request log
- `api`: routes and metrics
- `completion`: a completion while its samples are decoded; streams of events
- `description`: the OpenAPI description, made of the models of requests and responses
- `page/`: the page that browsers load
- `prompts`: a request's texts and token ids; prompts that are read in parts and scored
- `protocol`: requests, and the errors of wrong ones
- `responses`: responses and errors
- `scheduler`: one thread that decodes the samples of all clients in one batch
- `states`: states of the beginnings of prompts, and of answers that clients continue
- `server`: the socket, limits on connections, the shutdown
"""
