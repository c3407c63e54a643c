"""One file a step, each named after its revision. A step that was released is never changed."""
