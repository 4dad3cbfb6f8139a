"""The main job with a real vLLM as the engine: `python -m trajstore_vllm_demo`, in an environment that has vLLM.

Everything but the rollout process is that of `trajstore demo`.
"""
