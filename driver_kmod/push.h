/* SPDX-License-Identifier: GPL-2.0-only */
/* Pre-allocated buffers on their way through the walk queue. */
#ifndef VBW_PUSH_H
#define VBW_PUSH_H

#include <linux/list.h>
#include <linux/virtio.h>
#include <linux/wait.h>

#include "ranges.h"
#include "vballoon_walk_wire.h"

#define VBW_BUFFER_SIZE 32768u

/**
 * struct vbw_buffer - one buffer of VBW_BUFFER_SIZE bytes
 * @node: in one of the lists of struct vbw_push, or in none: with the device
 * @data: its memory, physically contiguous
 * @len: bytes filled
 * @num: records filled
 */
struct vbw_buffer {
	struct list_head node;
	void *data;
	unsigned int len;
	unsigned int num;
};

/**
 * struct vbw_push - the driver's end of the walk queue
 * @vq: the queue
 * @wait: a buffer was used, or the walk has to stop
 * @buffers: all of them
 * @nr: how many
 * @free: neither filled nor with the device
 * @full: filled, not with the device yet
 * @current_buffer: being filled with ranges, or NULL
 * @pending: range that may still grow
 * @round: command id, in the header of every buffer
 * @seq: of the next buffer
 * @unkicked: buffers in the queue that the device was not notified of
 * @sent_ranges: of this round
 * @sent_pages: of this round, in units of 4096 bytes
 * @sent_buffers: of this round, with ranges
 * @kicks: notifications since probe
 * @waits: since probe, for the device to use a buffer
 * @disturbed: whether a wait should end for @aborted to be asked; must not sleep
 * @aborted: whether what is being sent is not wanted any more; may sleep
 *
 * Used by one work item at a time, so it needs no lock. Only the callback of
 * the queue comes from elsewhere, and it does no more than wake @wait.
 */
struct vbw_push {
	struct virtqueue *vq;
	wait_queue_head_t wait;
	struct vbw_buffer *buffers;
	unsigned int nr;
	struct list_head free;
	struct list_head full;
	struct vbw_buffer *current_buffer;
	struct vbw_range pending;
	u32 round;
	u32 seq;
	unsigned int unkicked;
	u64 sent_ranges;
	u64 sent_pages;
	u32 sent_buffers;
	u64 kicks;
	u64 waits;
	bool (*disturbed)(struct vbw_push *push);
	bool (*aborted)(struct vbw_push *push);
};

int vbw_push_init(struct vbw_push *push, unsigned int nr);
void vbw_push_free(struct vbw_push *push);
void vbw_push_attach(struct vbw_push *push, struct virtqueue *vq);
void vbw_push_detach(struct vbw_push *push);

void vbw_push_until(struct vbw_push *push, bool (*disturbed)(struct vbw_push *push),
		    bool (*aborted)(struct vbw_push *push));
void vbw_push_start(struct vbw_push *push, u32 round);
int vbw_push_range(void *opaque, unsigned long pfn, unsigned long num);
int vbw_push_room(struct vbw_push *push);
int vbw_push_flush(struct vbw_push *push);

int vbw_push_message(struct vbw_push *push, u16 type, u16 flags, const void *body,
		     unsigned int body_len, const void *records, unsigned int record_len,
		     unsigned int num);
void vbw_push_kick(struct vbw_push *push);

#endif /* VBW_PUSH_H */
