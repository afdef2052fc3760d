/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The device as its parts see it. Each part (balloon, stats, reporting,
 * hinting, session) keeps its own state in its own structure; prototypes are
 * grouped by the file that defines them.
 */
#ifndef VBW_H
#define VBW_H

#include <linux/completion.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/page_reporting.h>
#include <linux/shrinker.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#ifdef VBW_HAVE_BALLOON_H
#include <linux/balloon.h>
#else
#include <linux/balloon_compaction.h>
#endif

#include "push.h"
#include "vballoon_walk_wire.h"
#include "walk.h"

#define VBW_PFNS_MAX 256	/* page numbers in one inflate or deflate request */
#define VBW_PFNS_PER_PAGE (1u << (PAGE_SHIFT - VBALLOON_PFN_SHIFT))

enum vbw_vq {
	VBW_VQ_INFLATE,
	VBW_VQ_DEFLATE,
	VBW_VQ_STATS,
	VBW_VQ_HINT,
	VBW_VQ_REPORTING,
	VBW_VQ_WALK,
	VBW_VQ_MAX
};

struct vbw_balloon {
	struct balloon_dev_info info;
	struct mutex lock;	/* num_pages, pfns and the two queues */
	struct work_struct resize;
	struct notifier_block oom;
	u32 num_pages;		/* of 4096 bytes, in the balloon */
	u32 num_pfns;
	__le32 pfns[VBW_PFNS_MAX];
};

struct vbw_stats {
	struct work_struct refill;
	struct vballoon_stat entries[VBALLOON_S_NR];
};

struct vbw_hinting {
	struct work_struct work;
	spinlock_t lock;	/* blocks and nr_blocks */
	struct list_head blocks;
	unsigned long nr_blocks;
	bool changed;		/* the command id has to be read again */
	u32 round;		/* last command id that was served */
	__le32 start;		/* what the queue carries around the hints */
	__le32 stop;
#ifdef VBW_HAVE_SHRINKER_ALLOC
	struct shrinker *shrinker;
#else
	struct shrinker shrinker;
#endif
};

/**
 * struct vbw_session - the rounds of the walk queue
 * @work: runs rounds and sends layouts; one at a time
 * @changed: the command id has to be read again
 * @send_layout: the memory map changed
 * @stopping: the device is going away
 * @round: last command id that was served
 * @push: buffers and queue
 * @walk: pace and results of the last walk
 * @rounds: begun since probe
 * @aborted: of these, ended early
 * @layouts: sent since probe
 * @duration_ns: of the last round
 * @result: of the last round
 * @node: in the list of sessions that a changed memory map concerns
 */
struct vbw_session {
	struct work_struct work;
	bool changed;
	bool send_layout;
	bool stopping;
	u32 round;
	struct vbw_push push;
	struct free_walk walk;
	u64 rounds;
	u64 aborted;
	u64 layouts;
	u64 duration_ns;
	int result;
	struct list_head node;
};

struct vbw_device {
	struct virtio_device *vdev;
	struct virtqueue *vqs[VBW_VQ_MAX];	/* NULL: not negotiated */
	struct workqueue_struct *wq;		/* hinting and rounds: long work */
	wait_queue_head_t acked;		/* a queue has used a buffer */
	spinlock_t stop_lock;			/* stop, against queueing work */
	bool stop;
	struct vbw_balloon balloon;
	struct vbw_stats stats;
	struct page_reporting_dev_info reporting;
	bool reporting_on;
	struct vbw_hinting hinting;
	struct vbw_session session;
	struct dentry *debugfs;
};

static inline bool vbw_has(struct vbw_device *vb, unsigned int feature)
{
	return virtio_has_feature(vb->vdev, feature);
}

/* main.c */
unsigned int vbw_slice_ns(void);
unsigned int vbw_buffer_count(void);
extern struct virtio_driver vbw_driver;

/* device.c */
void vbw_wake(struct virtqueue *vq);
bool vbw_queue_work(struct vbw_device *vb, struct workqueue_struct *wq, struct work_struct *work);

/* balloon.c */
void vbw_balloon_setup(struct vbw_device *vb);
int vbw_balloon_start(struct vbw_device *vb);
void vbw_balloon_stop(struct vbw_device *vb);
void vbw_balloon_changed(struct vbw_device *vb);
void vbw_balloon_update_actual(struct vbw_device *vb);
void vbw_balloon_deflate_all(struct vbw_device *vb);

/* stats.c */
void vbw_stats_setup(struct vbw_device *vb);
int vbw_stats_prime(struct vbw_device *vb);
void vbw_stats_request(struct virtqueue *vq);
void vbw_stats_stop(struct vbw_device *vb);

/* reporting.c */
int vbw_reporting_start(struct vbw_device *vb);
void vbw_reporting_stop(struct vbw_device *vb);

/* hinting.c */
void vbw_hinting_setup(struct vbw_device *vb);
int vbw_hinting_start(struct vbw_device *vb);
void vbw_hinting_stop(struct vbw_device *vb);
void vbw_hinting_changed(struct vbw_device *vb);
void vbw_hinting_release(struct vbw_device *vb);
void vbw_hinting_end(struct vbw_device *vb);

/* session.c */
int vbw_session_setup(struct vbw_device *vb);
void vbw_session_start(struct vbw_device *vb);
void vbw_session_stop(struct vbw_device *vb);
void vbw_session_free(struct vbw_device *vb);
void vbw_session_changed(struct vbw_device *vb);
void vbw_session_memory_changed(struct vbw_session *session);

/* memmap.c */
int vbw_memmap_init(void);
void vbw_memmap_exit(void);
void vbw_memmap_attach(struct vbw_session *session);
void vbw_memmap_detach(struct vbw_session *session);
int vbw_memmap_send(struct vbw_push *push);
u32 vbw_memmap_layout_id(void);

/* debugfs.c */
void vbw_debugfs_init(void);
void vbw_debugfs_exit(void);
void vbw_debugfs_add(struct vbw_device *vb);
void vbw_debugfs_remove(struct vbw_device *vb);

#endif /* VBW_H */
