// SPDX-License-Identifier: Apache-2.0
/* Taking buffers: following descriptor chains, split and packed, direct and indirect. */
#include "_native.h"

#include <stdatomic.h>

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 0x80, USED = 0x8000, RECORD = 16 };
static const uint64_t CHAIN_BYTES_MAX = 1ULL << 32;

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t a, b; /* split: flags, next; packed: id, flags */
};

struct taking {
	const uint8_t *table;     /* of the ring */
	uint32_t size;
	bool packed, indirect;
	struct guest *guest;
	uint16_t *slots;          /* by head or id: what an outstanding buffer has of the ring */
	Py_ssize_t slots_n;
	uint32_t held;            /* their sum */
	/* columns of the batch */
	uint16_t *ids, *taken;
	int64_t *first;
	uint64_t *addr;
	uint32_t *len;
	bool *writable;
	Py_ssize_t room, used;    /* elements */
	/* of the chain that is being followed */
	uint64_t total;
	uint32_t elements;
	bool write_seen;
	const uint64_t *span; /* that was right last time */
};

static inline struct desc load_desc(const uint8_t *at)
{
	uint64_t addr, rest;

	memcpy(&addr, at, 8);
	memcpy(&rest, at + 8, 8);
	FETCHED(addr);
	FETCHED(rest);
	return (struct desc){ addr, (uint32_t)rest, (uint16_t)(rest >> 32), (uint16_t)(rest >> 48) };
}

static inline bool holds(struct taking *t, uint64_t addr, uint64_t len)
{
	const uint64_t *span = t->span;
	uint64_t offset = addr - span[0];

	if (offset <= span[1] && len <= span[1] - offset)
		return true;
	for (Py_ssize_t i = 0; i < t->guest->runs; i++) {
		span = &t->guest->spans[2 * i];
		offset = addr - span[0];
		if (offset <= span[1] && len <= span[1] - offset) {
			t->span = span;
			return true;
		}
	}
	return false;
}

static inline bool add_element(struct taking *t, const struct desc *d, uint16_t flags)
{
	bool write = flags & WRITE;

	if (t->used == t->room || t->elements == t->size || (t->write_seen && !write) ||
	    !holds(t, d->addr, d->len))
		return false;
	t->total += d->len;
	if (t->total > CHAIN_BYTES_MAX)
		return false;
	t->addr[t->used] = d->addr;
	t->len[t->used] = d->len;
	t->writable[t->used++] = write;
	t->write_seen |= write;
	t->elements++;
	return true;
}

/* An indirect table: split tables may be in any order, packed ones are in their own. */
static bool follow_table(struct taking *t, const struct desc *d)
{
	uint32_t count = d->len / RECORD, at = 0;
	const uint8_t *table;

	if (!t->indirect || !d->len || d->len % RECORD || count > t->size)
		return false;
	table = guest_bytes(t->guest, d->addr, d->len);
	if (!table)
		return false;
	for (uint32_t visited = 0; visited < count; visited++) {
		struct desc e = load_desc(table + (size_t)RECORD * at);
		uint16_t flags = t->packed ? e.b : e.a;

		if ((!t->packed && flags & INDIRECT) || !add_element(t, &e, flags))
			return false;
		if (t->packed) {
			at++;
			continue;
		}
		if (!(flags & NEXT))
			return true;
		at = e.b;
		if (at >= count)
			return false;
	}
	return t->packed;
}

static void begin_chain(struct taking *t)
{
	t->total = 0;
	t->elements = 0;
	t->write_seen = false;
}

/* The chain at *head*; how many of the ring's descriptors it has, 0 where it is not in order. */
static uint32_t follow_split(struct taking *t, uint16_t head)
{
	uint32_t at = head, slots = 0;

	begin_chain(t);
	for (;;) {
		struct desc d = load_desc(t->table + (size_t)RECORD * at);

		slots++;
		if (d.a & INDIRECT)
			return !(d.a & NEXT) && follow_table(t, &d) ? slots : 0;
		if (!add_element(t, &d, d.a))
			return 0;
		if (!(d.a & NEXT))
			return slots;
		at = d.b;
		if (at >= t->size || slots == t->size)
			return 0;
	}
}

static bool keep_chain(struct taking *t, Py_ssize_t i, uint16_t id, uint32_t slots)
{
	if (id >= t->slots_n || t->slots[id] || t->held + slots > t->size)
		return false;
	t->slots[id] = (uint16_t)slots;
	t->held += slots;
	t->ids[i] = id;
	t->taken[i] = (uint16_t)slots;
	t->first[i + 1] = t->used;
	return true;
}

static Py_ssize_t take_split(struct taking *t, const uint16_t *ring, uint32_t from, Py_ssize_t limit)
{
	Py_ssize_t i;

	for (i = 0; i < limit; i++) {
		uint16_t head = *(const volatile uint16_t *)&ring[(from + i) & (t->size - 1)];
		Py_ssize_t before = t->used;

		if (head >= t->size || t->slots[head]) {
			break;
		}
		uint32_t slots = follow_split(t, head);
		if (!slots || !keep_chain(t, i, head, slots)) {
			t->used = before;
			break;
		}
	}
	return i;
}

static inline bool is_available(uint16_t flags, bool wrap)
{
	return (flags & (AVAIL | USED)) == (wrap ? AVAIL : USED);
}

/* The list at *slot*; its slots and id, 0 where it is not in order or not available. */
static uint32_t follow_packed(struct taking *t, uint32_t slot, bool wrap, uint16_t *id)
{
	uint32_t slots = 0;

	begin_chain(t);
	for (;;) {
		const uint8_t *at = t->table + (size_t)RECORD * slot;
		uint16_t flags = *(const volatile uint16_t *)(at + 14);

		if (!is_available(flags, wrap))
			return 0;
		atomic_thread_fence(memory_order_acquire);
		struct desc d = load_desc(at);
		d.b = flags;
		slots++;
		*id = d.a;
		if (flags & INDIRECT)
			return slots == 1 && !(flags & NEXT) && follow_table(t, &d) ? 1 : 0;
		if (!add_element(t, &d, flags))
			return 0;
		if (!(flags & NEXT))
			return slots;
		if (slots == t->size)
			return 0;
		if (++slot == t->size) {
			slot = 0;
			wrap = !wrap;
		}
	}
}

static Py_ssize_t take_packed(struct taking *t, uint32_t slot, bool wrap, Py_ssize_t limit)
{
	Py_ssize_t i;

	for (i = 0; i < limit; i++) {
		Py_ssize_t before = t->used;
		uint16_t id;
		uint32_t slots = follow_packed(t, slot, wrap, &id);

		if (!slots || !keep_chain(t, i, id, slots)) {
			t->used = before;
			break;
		}
		slot += slots;
		if (slot >= t->size) {
			slot -= t->size;
			wrap = !wrap;
		}
	}
	return i;
}

/*
 * take_run(memory, desc, ring, where, slots, out, limit, held) -> (buffers, elements, slots)
 *
 * The leading buffers that are in order beyond doubt, booked in *slots*.  desc: the descriptor area; ring: the heads of a split ring, None for a packed
 * one; where = (from, wrap, indirect); out = (ids, taken, first, addr, len, writable).
 */
CALLED(native_take_run)
{
	struct args a = { .count = 0 };
	struct array desc, slots, out[6], heads = { NULL, 0 };
	struct guest g = { .held = NULL };
	PyObject *columns[6];
	int from, wrap, indirect;
	Py_ssize_t done;

	(void)module;
	if (nargs != 8 || !open_guest(&g, &a, args[0]) || !take_arrays(&a, args + 1, "p", &desc) ||
	    (args[2] != Py_None && !take_arrays(&a, args + 2, "h", &heads)) ||
	    !PyArg_ParseTuple(args[3], "ipp", &from, &wrap, &indirect) ||
	    !take_arrays(&a, args + 4, "H", &slots) ||
	    !PyArg_ParseTuple(args[5], "OOOOOO", &columns[0], &columns[1], &columns[2], &columns[3],
			      &columns[4], &columns[5]) ||
	    !take_arrays(&a, columns, "HHQQIB", out))
		return failed(&a, "take_run takes 8 arguments");
	struct taking t = {
		.table = desc.data, .size = (uint32_t)desc.n, .packed = args[2] == Py_None,
		.indirect = indirect, .guest = &g, .span = g.spans, .slots = slots.data,
		.slots_n = slots.n, .ids = out[0].data, .taken = out[1].data, .first = out[2].data,
		.addr = out[3].data, .len = out[4].data, .writable = out[5].data, .room = out[3].n,
	};
	Py_ssize_t limit = PyLong_AsSsize_t(args[6]);
	t.held = (uint32_t)PyLong_AsUnsignedLong(args[7]);
	if (PyErr_Occurred() || limit < 0 || limit > out[0].n || limit > out[1].n ||
	    limit >= out[2].n || out[4].n != t.room || out[5].n != t.room || !g.runs ||
	    desc.n < 1 || desc.n > 32768 || from < 0 || t.held > t.size || slots.n < desc.n ||
	    (t.packed ? from >= desc.n : heads.n != desc.n || desc.n & (desc.n - 1)))
		return failed(&a, "columns that do not fit the ring");
	t.first[0] = 0;
	done = t.packed ? take_packed(&t, (uint32_t)from, wrap, limit) :
			  take_split(&t, heads.data, (uint32_t)from, limit);
	close_guest(&g);
	release(&a);
	return Py_BuildValue("nnI", done, t.used, (unsigned int)t.held);
}
