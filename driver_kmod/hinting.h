/* SPDX-License-Identifier: GPL-2.0-only */
/* Free page hinting. */
#ifndef VBW_HINTING_H
#define VBW_HINTING_H

#include <linux/shrinker.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

#include "work.h"

/**
 * struct vbw_hinting - the hinting queue and the blocks that are kept for it
 * @shared: of the device
 * @vq: the queue, or NULL
 * @wq: for @work, which may take long
 * @work: runs rounds and releases blocks
 * @lock: @blocks and @nr_blocks
 * @blocks: allocated, and hinted
 * @nr_blocks: how many
 * @changed: the command id has to be read again
 * @round: last command id that was served
 * @start: what the queue carries before the hints of a round
 * @stop: and after them
 * @shrinker: gives blocks back when the guest needs them
 */
struct vbw_hinting {
	struct vbw_shared *shared;
	struct virtqueue *vq;
	struct workqueue_struct *wq;
	struct work_struct work;
	spinlock_t lock; /* blocks and nr_blocks */
	struct list_head blocks;
	unsigned long nr_blocks;
	bool changed;
	u32 round;
	__le32 start;
	__le32 stop;
#ifdef VBW_HAVE_SHRINKER_ALLOC
	struct shrinker *shrinker;
#else
	struct shrinker shrinker;
#endif
};

void vbw_hinting_setup(struct vbw_hinting *hinting, struct vbw_shared *shared,
		       struct workqueue_struct *wq);
int vbw_hinting_start(struct vbw_hinting *hinting);
void vbw_hinting_stop(struct vbw_hinting *hinting);
void vbw_hinting_changed(struct vbw_hinting *hinting);
void vbw_hinting_cancel(struct vbw_hinting *hinting);
void vbw_hinting_release(struct vbw_hinting *hinting);

#endif /* VBW_HINTING_H */
