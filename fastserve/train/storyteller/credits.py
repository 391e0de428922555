"""The credit that CC-BY texts ask for: every author and title, by project, as one compact page."""

from __future__ import annotations

from collections import defaultdict

from fastserve.train.storyteller.corpus import Document

_HEAD = """# Credits of the built-in model

The built-in model was trained, besides public-domain books, on these picture-book stories, which their authors share
under a Creative Commons Attribution licence (https://creativecommons.org/licenses/by/4.0/) through the projects named
here. The stories were changed for training: layout removed, some words swapped. Their authors do not endorse the model.
"""


def credits_page(documents: list[Document]) -> str:
    """Markdown: a section for each project, a line for each author with their titles."""
    projects: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for document in documents:
        if document.author or document.title:
            projects[document.project][document.author.strip() or "Author not named"].add(document.title.strip())
    parts = [_HEAD]
    for project, authors in sorted(projects.items()):
        parts.append(f"## {project}\n")
        parts += [f"- {author}: {'; '.join(sorted(titles))}" for author, titles in sorted(authors.items())]
        parts.append("")
    return "\n".join(parts)
