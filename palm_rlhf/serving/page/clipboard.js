/** Copying text, also on pages over plain HTTP from another machine, where browsers offer no clipboard. */

/** Copies a text; returns whether that worked. */
export async function copy(text) {
    if (!navigator.clipboard) return copyBySelection(text);
    try {
        await navigator.clipboard.writeText(text);
        return true;
    } catch {
        return false;
    }
}

function copyBySelection(text) {
    const field = document.createElement("textarea");
    const focused = document.activeElement;
    field.value = text;
    document.body.append(field);
    field.select();
    const isCopied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return isCopied;
}
