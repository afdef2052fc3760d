// SPDX-License-Identifier: Apache-2.0
/* Giving buffers back: which were outstanding, and what is written to the ring. */
#include "_native.h"

enum { WRITE = 2, AVAIL = 0x80, USED = 0x8000, RECORD = 16 };

/*
 * book_given(slots, ids, out) -> slots that become free, or -1
 *
 * The buffers *ids* are not outstanding any more; *out* gets what each occupied.  -1, and nothing
 * is changed, where one of them is not outstanding, or is there twice.
 */
CALLED(native_book_given)
{
	struct args a = { .count = 0 };
	struct array in[3];
	Py_ssize_t i, total = 0;

	(void)module;
	if (nargs != 3 || !take_arrays(&a, args, "HhH", in))
		return failed(&a, "book_given takes 3 arguments");
	if (in[2].n < in[1].n)
		return failed(&a, "columns of different sizes");
	uint16_t *slots = in[0].data, *out = in[2].data;
	const uint16_t *ids = in[1].data;
	for (i = 0; i < in[1].n && ids[i] < in[0].n && slots[ids[i]]; i++) {
		total += out[i] = slots[ids[i]];
		slots[ids[i]] = 0;
	}
	if (i < in[1].n) {
		while (i--)
			slots[ids[i]] = out[i];
		total = -1;
	}
	release(&a);
	return PyLong_FromSsize_t(total);
}

/* used_split(elements, at, ids, written): the used elements of a split ring, no index. */
CALLED(native_used_split)
{
	struct args a = { .count = 0 };
	struct array ring, in[2];

	(void)module;
	if (nargs != 4 || !take_arrays(&a, args, "Q", &ring) || !take_arrays(&a, args + 2, "hi", in))
		return failed(&a, "used_split takes 4 arguments");
	uint32_t(*elements)[2] = ring.data;
	const uint16_t *ids = in[0].data;
	const uint32_t *written = in[1].data;
	Py_ssize_t at = PyLong_AsSsize_t(args[1]);
	if (PyErr_Occurred() || in[0].n != in[1].n || in[0].n > ring.n || at < 0 || at >= ring.n)
		return failed(&a, "columns that do not fit the ring");
	for (Py_ssize_t i = 0; i < in[0].n; i++) {
		elements[at][0] = ids[i];
		elements[at][1] = written[i];
		if (++at == ring.n)
			at = 0;
	}
	release(&a);
	Py_RETURN_NONE;
}

/*
 * used_packed(desc, at, wrap, ids, written, slots) -> flags of the first one
 *
 * The used descriptors of a packed ring, all but the first one's flags, which publish the rest.
 */
CALLED(native_used_packed)
{
	struct args a = { .count = 0 };
	struct array ring, in[3];
	uint16_t first = 0;

	(void)module;
	if (nargs != 6 || !take_arrays(&a, args, "P", &ring) || !take_arrays(&a, args + 3, "hih", in))
		return failed(&a, "used_packed takes 6 arguments");
	const uint16_t *ids = in[0].data, *slots = in[2].data;
	const uint32_t *written = in[1].data;
	Py_ssize_t at = PyLong_AsSsize_t(args[1]), size = ring.n;
	bool wrap = PyObject_IsTrue(args[2]) > 0;
	if (PyErr_Occurred() || in[0].n != in[1].n || in[0].n > in[2].n || in[0].n > size || at < 0 ||
	    at >= size)
		return failed(&a, "columns that do not fit the ring");
	for (Py_ssize_t i = 0; i < in[0].n; i++) {
		uint16_t flags = (wrap ? AVAIL | USED : 0) | (written[i] ? WRITE : 0);
		uint8_t *d = (uint8_t *)ring.data + RECORD * at;

		memcpy(d + 8, &written[i], 4);
		memcpy(d + 12, &ids[i], 2);
		if (i)
			memcpy(d + 14, &flags, 2);
		else
			first = flags;
		at += slots[i];
		if (at >= size) {
			at -= size;
			wrap = !wrap;
		}
		if (at >= size)
			return failed(&a, "a buffer larger than the ring");
	}
	release(&a);
	return PyLong_FromLong(first);
}
