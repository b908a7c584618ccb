"""``python -m tts_kernels``: versions, instruction sets, backends, and why one is missing."""

from __future__ import annotations

import platform

import torch

from . import __version__, backend_info


def main() -> None:
    """Print the version and the available backends of this installation."""
    info = backend_info()
    print(f"tts_kernels      {__version__}")
    print(f"torch            {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python           {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"instruction sets {', '.join(info.cpu_isas)}; in use: {info.cpu_isa}")
    print(f"  because        {info.cpu_isa_reason}")
    print(f"CUDA kernels     {info.cuda or 'there'}")
    print(f"backend          {info.in_use}")
    for name, missing in info.available.items():
        print(f"  {name:<14} {missing or 'there'}")
    print(f"GPU              {info.gpu}")
    for name in sorted(set(info.on_gpu.values())):
        print(f"  by {name:<11} {', '.join(op for op, runs in info.on_gpu.items() if runs == name)}")


if __name__ == "__main__":
    main()
