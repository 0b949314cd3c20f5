"""把训练结果上传到 Hugging Face Hub：默认私有，只传分享需要的文件；先检查 token，传完逐个核对；不发送密钥和本机路径。

Upload a training result to the Hugging Face Hub: private by default, only the files that sharing needs; the token is
checked first and every file verified afterwards; secrets and this machine's paths are not sent.

运行 / Run:
    python scripts/upload_lora_to_hub.py --repo_id NAME/REPO --dry_run    # 先看会发送什么 / look first
    HF_TOKEN=... python scripts/upload_lora_to_hub.py --repo_id NAME/REPO [--include merged] [--public]
"""

from __future__ import annotations

from lora_practice.console.errors import entry_point


@entry_point
def main(argv: list[str] | None = None) -> int:
    from lora_practice.export.hub.upload import main as upload

    return upload(argv, "upload_lora_to_hub.py")


if __name__ == "__main__":
    main()
