// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pre-allocated buffers of the walk queue.
 *
 * The walk's callback fills buffers and does nothing else: it neither waits
 * nor uses the queue. Between two slices vbw_push_room() makes full buffers
 * available to the device, takes used ones back, and waits if there is no room.
 * It returns how many blocks the next slice may report, so that the callback
 * always has a buffer. A notification costs more than a buffer, so the device
 * is notified only when half of the buffers are available.
 */
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "push.h"

#define HEADER_LEN ((unsigned int)sizeof(struct vballoon_walk_header))
#define RANGE_LEN ((unsigned int)sizeof(struct vballoon_walk_range))
#define RANGES_PER_BUFFER ((VBW_BUFFER_SIZE - HEADER_LEN) / RANGE_LEN)

/* Two more than the walk may fill: one for END, one for what END must follow. */
#define RESERVED_BUFFERS 2

/* The walk also works with few buffers, so the allocator need not try hard. */
#define BUFFER_GFP (GFP_KERNEL | __GFP_ZERO | __GFP_NORETRY | __GFP_NOWARN)

static_assert(VBW_BUFFER_SIZE <= VBALLOON_WALK_BUFFER_MAX);

/**
 * vbw_push_init - allocate the buffers
 * @push: to be filled in
 * @nr: how many buffers the walk may use; fewer are allocated if memory is
 *	fragmented
 *
 * Return: 0, or -ENOMEM if only the reserved buffers could be allocated.
 */
int vbw_push_init(struct vbw_push *push, unsigned int nr)
{
	unsigned int i;

	memset(push, 0, sizeof(*push));
	init_waitqueue_head(&push->wait);
	INIT_LIST_HEAD(&push->free);
	INIT_LIST_HEAD(&push->full);
	nr += RESERVED_BUFFERS;
	push->buffers = kcalloc(nr, sizeof(*push->buffers), GFP_KERNEL);
	if (!push->buffers)
		return -ENOMEM;
	for (i = 0; i < nr; i++) {
		struct vbw_buffer *buffer = &push->buffers[i];

		buffer->data = (void *)__get_free_pages(BUFFER_GFP, get_order(VBW_BUFFER_SIZE));
		if (!buffer->data)
			break;
		list_add(&buffer->node, &push->free);
		push->nr++;
	}
	if (push->nr > RESERVED_BUFFERS)
		return 0;
	vbw_push_free(push);
	return -ENOMEM;
}

/**
 * vbw_push_free - free the buffers; the device must have been reset
 * @push: the buffers of vbw_push_init()
 */
void vbw_push_free(struct vbw_push *push)
{
	unsigned int i;

	for (i = 0; i < push->nr; i++)
		free_pages((unsigned long)push->buffers[i].data, get_order(VBW_BUFFER_SIZE));
	kfree(push->buffers);
	push->buffers = NULL;
	push->nr = 0;
}

/**
 * vbw_push_attach - begin to use a queue, all buffers being free
 * @push: the buffers
 * @vq: the queue
 */
void vbw_push_attach(struct vbw_push *push, struct virtqueue *vq)
{
	push->vq = vq;
	virtqueue_disable_cb(vq);
}

/**
 * vbw_push_detach - take all buffers back; the device must have been reset
 * @push: the buffers
 */
void vbw_push_detach(struct vbw_push *push)
{
	unsigned int i;

	while (virtqueue_detach_unused_buf(push->vq))
		;
	INIT_LIST_HEAD(&push->free);
	INIT_LIST_HEAD(&push->full);
	push->current_buffer = NULL;
	push->pending.num = 0;
	push->unkicked = 0;
	for (i = 0; i < push->nr; i++)
		list_add(&push->buffers[i].node, &push->free);
	push->vq = NULL;
}

static void reclaim(struct vbw_push *push)
{
	struct vbw_buffer *buffer;
	unsigned int len;

	while ((buffer = virtqueue_get_buf(push->vq, &len)))
		list_add(&buffer->node, &push->free);
}

/**
 * vbw_push_kick - notify the device of everything in the queue
 * @push: the buffers
 */
void vbw_push_kick(struct vbw_push *push)
{
	if (!push->unkicked)
		return;
	push->unkicked = 0;
	if (virtqueue_kick_prepare(push->vq)) {
		push->kicks++;
		virtqueue_notify(push->vq);
	}
}

static int submit(struct vbw_push *push, struct vbw_buffer *buffer)
{
	struct scatterlist sg;
	int err;

	sg_init_one(&sg, buffer->data, buffer->len);
	err = virtqueue_add_outbuf(push->vq, &sg, 1, buffer, GFP_KERNEL);
	if (err)
		return err;
	if (++push->unkicked >= max(push->nr / 2, 1u))
		vbw_push_kick(push);
	return 0;
}

/* Make full buffers available until the queue is full. */
static int submit_full(struct vbw_push *push)
{
	struct vbw_buffer *buffer, *next;
	int err;

	list_for_each_entry_safe(buffer, next, &push->full, node) {
		list_del(&buffer->node);
		err = submit(push, buffer);
		if (err) {
			list_add(&buffer->node, &push->full);
			return err == -ENOSPC ? 0 : err;
		}
	}
	return 0;
}

static bool progress(struct vbw_push *push)
{
	struct vbw_buffer *before = list_first_entry_or_null(&push->free, struct vbw_buffer, node);

	reclaim(push);
	if (list_first_entry_or_null(&push->free, struct vbw_buffer, node) == before &&
	    virtqueue_enable_cb(push->vq))
		return false;
	reclaim(push);
	virtqueue_disable_cb(push->vq);
	return true;
}

/*
 * Wait until the device has used a buffer. The reason to stop waiting may have
 * to be read from the configuration, which may sleep. It is therefore read only
 * after a wake-up that may have such a reason.
 */
static int wait_for_device(struct vbw_push *push)
{
	vbw_push_kick(push);
	push->waits++;
	wait_event_idle(push->wait, progress(push) || virtqueue_is_broken(push->vq) ||
			push->disturbed(push));
	if (virtqueue_is_broken(push->vq))
		return -EIO;
	return push->aborted(push) ? -ECANCELED : 0;
}

/* Wait for @nr free buffers, and until no full one is left. */
static int want_free(struct vbw_push *push, unsigned int nr)
{
	struct list_head *pos;
	unsigned int have;
	int err;

	for (;;) {
		reclaim(push);
		err = submit_full(push);
		if (err)
			return err;
		have = 0;
		list_for_each(pos, &push->free)
			have++;
		if (have >= nr && list_empty(&push->full))
			return have;
		err = wait_for_device(push);
		if (err)
			return err;
	}
}

static struct vbw_buffer *take_free(struct vbw_push *push)
{
	struct vbw_buffer *buffer = list_first_entry_or_null(&push->free, struct vbw_buffer, node);

	if (buffer) {
		list_del(&buffer->node);
		buffer->len = HEADER_LEN;
		buffer->num = 0;
	}
	return buffer;
}

static void fill_header(struct vbw_push *push, struct vbw_buffer *buffer, u16 type, u16 flags)
{
	struct vballoon_walk_header *header = buffer->data;

	header->type = cpu_to_le16(type);
	header->flags = cpu_to_le16(flags);
	header->round = cpu_to_le32(push->round);
	header->seq = cpu_to_le32(push->seq++);
	header->num = cpu_to_le32(buffer->num);
}

static void close_current(struct vbw_push *push)
{
	if (!push->current_buffer)
		return;
	fill_header(push, push->current_buffer, VBALLOON_WALK_RANGES, 0);
	list_add_tail(&push->current_buffer->node, &push->full);
	push->current_buffer = NULL;
	push->sent_buffers++;
}

/* Write the pending range into a buffer. */
static int store_pending(struct vbw_push *push)
{
	const unsigned int shift = PAGE_SHIFT - VBALLOON_PFN_SHIFT;
	struct vbw_buffer *buffer = push->current_buffer;
	struct vballoon_walk_range *range;

	if (!push->pending.num)
		return 0;
	if (!buffer) {
		buffer = take_free(push);
		if (!buffer)
			return -ENOBUFS;
		push->current_buffer = buffer;
	}
	range = buffer->data + buffer->len;
	range->pfn = cpu_to_le64(push->pending.pfn << shift);
	range->num = cpu_to_le64(push->pending.num << shift);
	push->sent_ranges++;
	push->sent_pages += push->pending.num << shift;
	push->pending.num = 0;
	buffer->len += RANGE_LEN;
	if (++buffer->num == RANGES_PER_BUFFER)
		close_current(push);
	return 0;
}

/**
 * vbw_push_until - set the conditions that end a wait for the device
 * @push: the buffers
 * @disturbed: see struct vbw_push
 * @aborted: see struct vbw_push
 */
void vbw_push_until(struct vbw_push *push, bool (*disturbed)(struct vbw_push *push),
		    bool (*aborted)(struct vbw_push *push))
{
	push->disturbed = disturbed;
	push->aborted = aborted;
}

/**
 * vbw_push_start - begin a series of buffers: a round, or a set (round 0)
 * @push: the buffers
 * @round: the round id in every header
 */
void vbw_push_start(struct vbw_push *push, u32 round)
{
	push->round = round;
	push->seq = 0;
	push->sent_ranges = 0;
	push->sent_pages = 0;
	push->sent_buffers = 0;
}

/**
 * vbw_push_range - callback of the walk: take a free block
 * @opaque: the struct vbw_push
 * @pfn: its first page
 * @num: its number of pages
 *
 * Context: under zone->lock. Neither sleeps nor allocates.
 * Return: 0, or -ENOBUFS if vbw_push_room() was not called before.
 */
int vbw_push_range(void *opaque, unsigned long pfn, unsigned long num)
{
	struct vbw_push *push = opaque;
	int err;

	if (vbw_range_join(&push->pending, pfn, num))
		return 0;
	err = store_pending(push);
	if (err)
		return err;
	push->pending.pfn = pfn;
	push->pending.num = num;
	return 0;
}

/**
 * vbw_push_room - make room for blocks
 * @push: the buffers
 *
 * Context: may sleep, until the device has used buffers.
 * Return: how many blocks may be reported now, at least 1, or a negative error
 * number: -ECANCELED when the round was cancelled, -EIO when the queue
 * is broken.
 */
int vbw_push_room(struct vbw_push *push)
{
	int have, room;

	/* The last place of the current buffer is reserved for the pending range. */
	if (push->current_buffer && push->current_buffer->num == RANGES_PER_BUFFER - 1)
		close_current(push);
	have = want_free(push, RESERVED_BUFFERS + !push->current_buffer);
	if (have < 0)
		return have;
	if (push->aborted(push))
		return -ECANCELED;
	room = (have - RESERVED_BUFFERS) * RANGES_PER_BUFFER;
	if (push->current_buffer)
		room += RANGES_PER_BUFFER - push->current_buffer->num;
	return room - 1; /* the pending one */
}

/**
 * vbw_push_flush - make all reported ranges available to the device
 * @push: the buffers
 *
 * Return: 0 or a negative error number, as vbw_push_room().
 */
int vbw_push_flush(struct vbw_push *push)
{
	int err = store_pending(push);

	close_current(push);
	return err ? err : submit_full(push);
}

/**
 * vbw_push_message - send a buffer that is not made of ranges
 * @push: the buffers
 * @type: VBALLOON_WALK_*
 * @flags: of the header
 * @body: what follows the header
 * @body_len: its bytes
 * @records: what follows the body, or NULL
 * @record_len: bytes of one record
 * @num: how many records
 *
 * Context: may sleep, until the device has used buffers.
 * Return: 0 or a negative error number, as vbw_push_room().
 */
int vbw_push_message(struct vbw_push *push, u16 type, u16 flags, const void *body,
		     unsigned int body_len, const void *records, unsigned int record_len,
		     unsigned int num)
{
	struct vbw_buffer *buffer;
	int have = want_free(push, 1);

	if (have < 0)
		return have;
	buffer = take_free(push);
	memcpy(buffer->data + buffer->len, body, body_len);
	buffer->len += body_len;
	if (num)
		memcpy(buffer->data + buffer->len, records, num * record_len);
	buffer->len += num * record_len;
	buffer->num = num;
	fill_header(push, buffer, type, flags);
	list_add_tail(&buffer->node, &push->full);
	return submit_full(push);
}
