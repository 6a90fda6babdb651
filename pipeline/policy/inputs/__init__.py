"""What an agent may see of a cached token: a file each, named by ``train.agent.inputs`` of params.yaml."""
