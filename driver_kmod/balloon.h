/* SPDX-License-Identifier: GPL-2.0-only */
/* Inflating and deflating. */
#ifndef VBW_BALLOON_H
#define VBW_BALLOON_H

#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "vballoon_walk_wire.h"
#include "work.h"

#define VBW_PFNS_MAX 256	/* page numbers in one inflate or deflate request */
#define VBW_PFNS_PER_PAGE (1u << (PAGE_SHIFT - VBALLOON_PFN_SHIFT))

/**
 * struct vbw_balloon - the pages that the host has
 * @shared: of the device
 * @inflate_vq: the queue for pages that the host gets
 * @deflate_vq: the queue for pages that come back
 * @info: the pages, as the kernel's balloon compaction keeps them
 * @lock: @num_pages, @pfns and the two queues
 * @resize: moves the size towards the host's target
 * @oom: called before the kernel kills for want of memory
 * @num_pages: size, in units of 4096 bytes
 * @num_pfns: page numbers in @pfns
 * @pfns: the request that is being filled or is with the host
 */
struct vbw_balloon {
	struct vbw_shared *shared;
	struct virtqueue *inflate_vq;
	struct virtqueue *deflate_vq;
	struct balloon_dev_info info;
	struct mutex lock; /* num_pages, pfns and the two queues */
	struct work_struct resize;
	struct notifier_block oom;
	u32 num_pages;
	u32 num_pfns;
	__le32 pfns[VBW_PFNS_MAX];
};

void vbw_balloon_setup(struct vbw_balloon *balloon, struct vbw_shared *shared);
void vbw_balloon_free(struct vbw_balloon *balloon);
int vbw_balloon_start(struct vbw_balloon *balloon);
void vbw_balloon_stop(struct vbw_balloon *balloon);
void vbw_balloon_changed(struct vbw_balloon *balloon);
void vbw_balloon_cancel(struct vbw_balloon *balloon);
void vbw_balloon_update_actual(struct vbw_balloon *balloon);
void vbw_balloon_deflate_all(struct vbw_balloon *balloon);

#endif /* VBW_BALLOON_H */
