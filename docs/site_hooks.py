"""What the documentation site needs beyond MkDocs: links into the repository, and links between docstrings."""

import re
from pathlib import Path

LINK = re.compile(r"\]\((?!\w+:)([^)#]+)(#[^)]*)?\)")
MENTION = re.compile(r"\[<code>~?([\w.]+)</code>\]")
# A type such as "`int`, *optional*, defaults to `8`", which mkdocstrings takes for code, and the default again.
TYPE = re.compile(r"\(<code>([\[`].*?)</code>(?:, default:\s*<code>.*?</code>\s*)?\)", re.DOTALL)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links to files of the repository that are no part of the site lead to the repository."""
    root = Path(config.config_file_path).parent.resolve()

    def elsewhere(match: re.Match) -> str:
        file = Path(page.file.abs_src_path).parent.joinpath(match[1]).resolve()
        on_site = file.suffix in (".md", ".png") and file.parent.is_relative_to(config.docs_dir)
        if on_site or not file.exists():  # MkDocs reports what does not exist
            return match[0]
        return f"]({config.repo_url}/blob/main/{file.relative_to(root).as_posix()}{match[2] or ''})"

    return LINK.sub(elsewhere, markdown)


def on_page_content(html: str, page, config, files) -> str:
    """Renders docstrings in the form of Hugging Face: types of arguments, and links to names on the same page."""
    html = TYPE.sub(lambda match: "(" + re.sub(r"\[`~?([\w.]+)`\]|[`*]", r"\1", match[1]) + ")", html)
    targets = {name.rpartition(".")[2]: name for name in re.findall(r'id="(hf_mtp\.[\w.]+)"', html)}

    def link(match: re.Match) -> str:
        name = match[1].rpartition(".")[2]
        code = f"<code>{name}</code>"
        return f'<a href="#{targets[name]}">{code}</a>' if name in targets else code

    return MENTION.sub(link, html)
