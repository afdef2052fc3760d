// SPDX-License-Identifier: Apache-2.0
/*
 * The inner loops that NumPy takes several passes for, one pass each: the module, and how it gets
 * at arrays and at guest memory.  Optional: everything here has a form in NumPy that means the
 * same, is tested beside it, and is used where this was not built.
 */
#include "_native.h"

/* ---- arrays ---- */

static Py_ssize_t item_size(char letter)
{
	switch (letter | 0x20) {
	case 'h': return 2;
	case 'i': return 4;
	case 'q': return 8;
	case 'p': return 16;
	case 't': return 24;
	default: return 1;
	}
}

bool take_arrays(struct args *a, PyObject *const *objects, const char *spec, struct array *out)
{
	for (; *spec; spec++, objects++, out++) {
		Py_buffer *view = &a->views[a->count];
		bool write = !(*spec & 0x20);

		if (a->count == ARRAYS_MAX) {
			PyErr_SetString(PyExc_SystemError, "too many arrays");
			return false;
		}
		if (PyObject_GetBuffer(*objects, view, write ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
			return false;
		a->count++;
		if (view->len % item_size(*spec)) {
			PyErr_SetString(PyExc_ValueError, "a buffer of an odd size");
			return false;
		}
		out->data = view->buf;
		out->n = view->len / item_size(*spec);
	}
	return true;
}

void release(struct args *a)
{
	while (a->count)
		PyBuffer_Release(&a->views[--a->count]);
}

PyObject *failed(struct args *a, const char *why)
{
	release(a);
	if (!PyErr_Occurred())
		PyErr_SetString(PyExc_ValueError, why);
	return NULL;
}

/* ---- guest memory ---- */

bool open_guest(struct guest *g, struct args *a, PyObject *memory)
{
	PyObject *tables[2];
	struct array found[2];

	memset(g, 0, sizeof(*g));
	if (!PyArg_ParseTuple(memory, "OOO!", &tables[0], &tables[1], &PyList_Type, &g->views) ||
	    !take_arrays(a, tables, "pp", found))
		return false;
	g->extents = found[0].data;
	g->regions = found[0].n;
	g->spans = found[1].data;
	g->runs = found[1].n;
	if (PyList_Size(g->views) != g->regions) {
		PyErr_SetString(PyExc_ValueError, "tables of different sizes");
		return false;
	}
	return true;
}

void close_guest(struct guest *g)
{
	if (!g->held)
		return;
	for (Py_ssize_t i = 0; i < g->regions; i++)
		if (g->held[i].obj)
			PyBuffer_Release(&g->held[i]);
	PyMem_Free(g->held);
}

/* The mapping of region *i*, held until the guest is closed; NULL where it has none. */
static const uint8_t *mapping(struct guest *g, Py_ssize_t i)
{
	PyObject *view = PyList_GetItem(g->views, i);

	if (!view || view == Py_None)
		return NULL;
	if (!g->held && !(g->held = PyMem_Calloc((size_t)g->regions, sizeof(*g->held))))
		return NULL;
	if (!g->held[i].obj && PyObject_GetBuffer(view, &g->held[i], PyBUF_SIMPLE) < 0) {
		PyErr_Clear(); /* not in one piece: then others read it */
		return NULL;
	}
	return (uint64_t)g->held[i].len >= g->extents[2 * i + 1] ? g->held[i].buf : NULL;
}

const uint8_t *guest_bytes(struct guest *g, uint64_t addr, uint64_t len)
{
	uint64_t offset = addr - g->low;

	if (g->base && offset <= g->size && len <= g->size - offset)
		return g->base + offset;
	for (Py_ssize_t i = 0; i < g->regions; i++) {
		const uint64_t *extent = &g->extents[2 * i];

		offset = addr - extent[0];
		if (offset > extent[1] || len > extent[1] - offset)
			continue;
		const uint8_t *base = mapping(g, i);
		if (!base)
			return NULL;
		g->low = extent[0];
		g->size = extent[1];
		g->base = base;
		return base + offset;
	}
	return NULL;
}

/* ---- the module ---- */

#define METHOD(name) \
	{ #name, (PyCFunction)(void (*)(void))native_##name, METH_FASTCALL, "See native/interface.py." }

static PyMethodDef methods[] = {
	METHOD(mark_pages), METHOD(mark_bytes), METHOD(mark_records), METHOD(mark_guest_records),
	METHOD(count),      METHOD(unite),      METHOD(merge),        METHOD(blocks),
	METHOD(in_file),    METHOD(page_runs),  METHOD(punch),        METHOD(take_run),
	METHOD(book_given), METHOD(used_split), METHOD(used_packed),
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, "_native", "Inner loops; see vballoon.native.", -1, methods,
	NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
	return PyModule_Create(&definition);
}
