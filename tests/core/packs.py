"""Archiving chosen entries by hand, without an archiver's horizon, feed and trimming."""

from tests.builders import SPEC
from trajstore.archive.writer import PackWriter, StagedEntry

__all__ = ["pack"]


def pack(store, id, *, entries=(), notes=(), on_step=lambda _: None):
    """Archive these hot entries and notes of a trajectory, and trim nothing."""
    manifest = store.archive.manifest(store.keys.partition(id))
    newest = manifest.refresh()
    writer = PackWriter(store.archive.root, store.archive.info, store.keys.partition(id), SPEC)
    staged = [
        StagedEntry.from_hot(e.at, e.data, list(store.hot.payloads(id, e.events(note=note))), note=note)
        for note, found in ((False, entries), (True, notes))
        for e in found
    ]
    writer.add(id, staged, summary=None)
    writer.publish(manifest, newest + 1, writer="test", on_step=on_step)
