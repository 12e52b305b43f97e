export async function example(view) { view.fail(new Error("this view is not there yet")); }
